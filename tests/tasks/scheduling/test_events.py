"""Automations of a server that wait for an event, with Prefect's own objects."""

from typing import Any
from uuid import uuid4

import pytest
from prefect.events.actions import DoNothing, RunDeployment
from prefect.events.schemas.automations import Automation, CompoundTrigger, EventTrigger, Posture

from tasks.scheduling.events import deployments_waiting, make_event

NEW = "dpo.dataset.new"
EVENT = make_event(NEW, "dpo.dataset.support", "support", {})
RUNS = RunDeployment(source="selected", deployment_id=uuid4())


class Server:
    """A client whose server holds these automations and gives them in pages."""

    def __init__(self, *held: Automation) -> None:
        self.held = held

    def read_automations(self, limit: int, offset: int) -> list[Automation]:
        return list(self.held[offset : offset + limit])


def trigger(**changes: Any) -> EventTrigger:
    facts: dict[str, Any] = {"match": {"prefect.resource.id": "dpo.dataset.*"}, "expect": {NEW}}
    return EventTrigger.model_validate(facts | {"posture": Posture.Reactive, "threshold": 1} | changes)


def automation(name: str = "waits", **changes: Any) -> Automation:
    facts: dict[str, Any] = {"id": uuid4(), "name": name, "enabled": True, "trigger": trigger()}
    return Automation(**facts | {"actions": [RUNS]} | changes)


@pytest.mark.parametrize(
    ("held", "waiting"),
    [
        (automation(), ["waits"]),
        (automation(trigger=trigger(expect={"dpo.dataset.*"})), ["waits"]),
        (automation(trigger=trigger(expect=set(), match={})), ["waits"]),
        (automation(trigger=CompoundTrigger(triggers=[trigger()], require="all", within=60)), ["waits"]),
        (automation(enabled=False), []),
        (automation(actions=[DoNothing()]), []),
        (automation(trigger=trigger(expect={"prefect.flow-run.Failed"})), []),
        (automation(trigger=trigger(match={"prefect.resource.id": "dpo.dataset.other"})), []),
        (automation(trigger=trigger(match_related={"prefect.resource.id": "prefect.tag.x"})), []),
    ],
)
def test_only_what_would_run_waits(held: Automation, waiting: list[str]) -> None:
    assert deployments_waiting(Server(held), EVENT) == waiting


def test_a_server_without_automations_and_one_with_many() -> None:
    assert deployments_waiting(Server(), EVENT) == []
    many = [automation(f"no-{n}", enabled=False) for n in range(400)]
    assert deployments_waiting(Server(*many, automation("last")), EVENT) == ["last"]
