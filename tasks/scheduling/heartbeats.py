"""The automation that marks runs as crashed when their heartbeats stop (power failure, lost node or pod).

The process that would report the failure is lost with the run. Without this automation such a run stays
`Running` for ever, and blocks all later runs because its deployment allows one at a time. Runs of deployments
send heartbeats, but a self-hosted server does nothing when they stop unless it has this automation.
"""

from datetime import timedelta
from typing import Any

from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.settings import get_current_settings

from tasks.scheduling.deployments import MADE_BY, Change, automation_fields

HEARTBEAT_AUTOMATION = "dpo: crash runs that fell silent"
_MISSED = 3
"""Number of heartbeats that may be missed: a request can be lost, and a machine can be busy."""


def silence() -> timedelta:
    """The longest time without a heartbeat: three times PREFECT_FLOWS_HEARTBEAT_FREQUENCY (180 seconds)."""
    return timedelta(seconds=_MISSED * (get_current_settings().flows.heartbeat_frequency or 180))


def plan_heartbeats(client: Any) -> list[Change]:
    """The changes that `apply_heartbeats` would make."""
    existing = _existing(client)
    if existing is None:
        return [Change(kind="added", place=HEARTBEAT_AUTOMATION)]
    if automation_fields(existing) != automation_fields(_automation()):
        return [Change(kind="changed", place=HEARTBEAT_AUTOMATION, old="another", new="of this version")]
    return []


def apply_heartbeats(client: Any) -> None:
    """Create the automation on the server, in place of an earlier version of it."""
    existing = _existing(client)
    client.create_automation(_automation())
    if existing is not None:
        client.delete_automation(existing.id)


def _existing(client: Any) -> Any:
    automations = client.read_automations()
    return next((automation for automation in automations if automation.name == HEARTBEAT_AUTOMATION), None)


def _automation() -> Any:
    trigger = EventTrigger(
        posture=Posture.Proactive,
        after={"prefect.flow-run.heartbeat"},
        # Any event of the run counts. A list of final states would miss custom names (GateRefused), and such
        # finished runs would be marked as crashed.
        expect={"prefect.flow-run.*"},
        match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]}),
        for_each={"prefect.resource.id"},
        within=silence(),
    )
    seconds = int(silence().total_seconds())
    message = f"No heartbeat for {seconds} s: the run's process or machine is gone."
    return AutomationCore(
        name=HEARTBEAT_AUTOMATION,
        description=f"Marks runs of deployments as crashed when their heartbeats stop. {MADE_BY}",
        trigger=trigger,
        actions=[ChangeFlowRunState(state=StateType.CRASHED, message=message)],
    )
