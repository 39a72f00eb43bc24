"""Which automations `dpo deploy` removes because their deployment is gone."""

from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

from tasks.scheduling.deployment_file import MADE_BY
from tasks.scheduling.deployments import plan_lost_triggers


class Server:
    """Answers which of some deployments it has."""

    def __init__(self, *there: UUID) -> None:
        self.there = there

    def read_deployments(self, *, deployment_filter: Any) -> list[UUID]:
        return [number for number in deployment_filter.id.any_ if number in self.there]


def automation(name: str, deployment: UUID) -> Any:
    action = SimpleNamespace(deployment_id=deployment)
    return SimpleNamespace(name=name, description=MADE_BY, actions=[action])


def test_a_trigger_stays_while_its_deployment_is_there_even_if_another_file_made_it() -> None:
    other, gone = uuid4(), uuid4()
    steps = plan_lost_triggers(Server(other), [automation("other", other), automation("lost", gone)])
    assert [str(change) for step in steps for change in step.changes] == [
        "- trigger lost of a deleted deployment"
    ]
