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

from tasks.scheduling.automations import Step, automation_fields, automation_step
from tasks.scheduling.deployment_file import MADE_BY

HEARTBEAT_AUTOMATION = "dpo: crash runs that fell silent"
_MISSED = 3
"""Number of heartbeats that may be missed: a request can be lost, and a machine can be busy."""


def silence() -> timedelta:
    """The longest time without a heartbeat: three times PREFECT_FLOWS_HEARTBEAT_FREQUENCY (180 seconds)."""
    return timedelta(seconds=_MISSED * (get_current_settings().flows.heartbeat_frequency or 180))


def plan_heartbeats(client: Any, automations: list[Any]) -> Step:
    """The step that gives the server this automation."""
    old = next((automation for automation in automations if automation.name == HEARTBEAT_AUTOMATION), None)
    fresh = bool(old and automation_fields(old) == automation_fields(_automation()))
    return automation_step(client, old, _automation, HEARTBEAT_AUTOMATION, fresh)


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
