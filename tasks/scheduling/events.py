"""Sends events to a Prefect server, such as a refused promotion, and finds the automations that expect them.

An event is sent in one synchronous request, so that an unreachable server raises an error.
"""

from datetime import UTC, datetime
from typing import Any

from prefect.events.schemas.events import Event, RelatedResource, Resource
from prefect.server.events.schemas.automations import Automation, EventTrigger
from prefect.server.events.schemas.events import ReceivedEvent

from tasks.scheduling.alerts import PROMOTION_REFUSED, TAG
from tasks.scheduling.automations import read_automations


def make_event(
    event: str, resource: str, name: str, payload: dict[str, Any], *, tagged: bool = False
) -> Event:
    """An event.

    Args:
        resource: id of the resource that the event is about; triggers match on it.
        tagged: relate the event to the tag that alerts match.
    """
    tag = {"prefect.resource.id": f"prefect.tag.{TAG}", "prefect.resource.role": "tag"}
    return Event(
        event=event,
        occurred=datetime.now(UTC),
        resource=Resource({"prefect.resource.id": resource, "prefect.resource.name": name}),
        related=[RelatedResource(tag)] if tagged else [],
        payload=payload,
    )


def send(client: Any, event: Event) -> None:
    """Send an event with a synchronous client of the server."""
    client.request("POST", "/events", json=[event.model_dump(mode="json")])


def deployments_waiting(client: Any, event: Event) -> list[str]:
    """Names of the enabled automations that run a deployment on this event, by the server's own rules."""
    received = ReceivedEvent.model_validate(event.model_dump())
    return sorted(
        automation.name
        for automation in read_automations(client)
        if automation.enabled
        and any(action.type == "run-deployment" for action in automation.actions)
        and any(
            trigger.covers(received)
            for trigger in Automation.model_validate(automation.model_dump()).triggers_of_type(EventTrigger)
        )
    )


def promotion_refused(client: Any, model: str, version: str, message: str) -> None:
    """Send the event of a refused promotion, whose message an alert forwards."""
    payload = {"model": model, "version": version, "message": message}
    send(client, make_event(PROMOTION_REFUSED, f"dpo.model.{model}", model, payload, tagged=True))
