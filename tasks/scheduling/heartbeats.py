"""The automation that ends runs of which nothing is heard any more: no power, an evicted pod, a lost node.

The process that would say so is gone with them. Without the automation such a run is `Running` for ever, and
its deployment's limit of one holds every later run back. Runs of deployments send heartbeats; a server of
one's own does not act on their absence unless it is told to.
"""

from datetime import timedelta
from typing import Any

from tasks.scheduling.deployments import MADE_BY, Change, automation_fields

ZOMBIES = "dpo: crash runs that fell silent"
_MISSED = 3
"""Heartbeats that may be missed: one request can be lost, and a machine can be busy."""


def silence() -> timedelta:
    """How long a run may be silent; heartbeats come every PREFECT_FLOWS_HEARTBEAT_FREQUENCY seconds (180)."""
    from prefect.settings import get_current_settings

    return timedelta(seconds=_MISSED * (get_current_settings().flows.heartbeat_frequency or 180))


def is_missing(client: Any) -> bool:
    """Whether the server would leave a lost run `Running`."""
    return _found(client) is None


def plan_zombies(client: Any) -> list[Change]:
    """What `apply_zombies` would change."""
    found = _found(client)
    if found is None:
        return [Change(kind="added", place=ZOMBIES)]
    if automation_fields(found) != automation_fields(_automation()):
        return [Change(kind="changed", place=ZOMBIES, old="another", new="of this version")]
    return []


def apply_zombies(client: Any) -> None:
    """Make the server hold the automation once, as it is here."""
    found = _found(client)
    client.create_automation(_automation())
    if found is not None:
        client.delete_automation(found.id)


def _found(client: Any) -> Any:
    return next((one for one in client.read_automations() if one.name == ZOMBIES), None)


def _automation() -> Any:
    from prefect.client.schemas.objects import StateType
    from prefect.events.actions import ChangeFlowRunState
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
    from prefect.events.schemas.events import ResourceSpecification

    trigger = EventTrigger(
        posture=Posture.Proactive,
        after={"prefect.flow-run.heartbeat"},
        # Any word of the run will do. A list of ends would miss those with names of their own (GateRefused),
        # and finished runs would be called crashed.
        expect={"prefect.flow-run.*"},
        match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]}),
        for_each={"prefect.resource.id"},
        within=silence(),
    )
    seconds = int(silence().total_seconds())
    told = f"Nothing was heard of the run for {seconds} s: its process or machine is gone."
    return AutomationCore(
        name=ZOMBIES,
        description=f"Marks runs of deployments as crashed when their heartbeats stop. {MADE_BY}",
        trigger=trigger,
        actions=[ChangeFlowRunState(state=StateType.CRASHED, message=told)],
    )
