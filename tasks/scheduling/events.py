"""Sends events to a Prefect server, such as a refused promotion, and finds the automations that expect them.

An event is sent in one synchronous request, so that an unreachable server raises an error.
"""

from datetime import UTC, datetime
from fnmatch import fnmatchcase
from typing import Any

from prefect.events.schemas.events import Event, RelatedResource, Resource

from tasks.scheduling.alerts import PROMOTION_REFUSED, TAG


def send(
    client: Any, event: str, resource: str, name: str, payload: dict[str, Any], *, tagged: bool = False
) -> str:
    """Send one event; returns its id.

    Args:
        client: a synchronous client of the server.
        resource: id of the resource that the event is about; triggers match on it.
        tagged: relate the event to the tag that alerts match.
    """
    tag = {"prefect.resource.id": f"prefect.tag.{TAG}", "prefect.resource.role": "tag"}
    message = Event(
        event=event,
        occurred=datetime.now(UTC),
        resource=Resource({"prefect.resource.id": resource, "prefect.resource.name": name}),
        related=[RelatedResource(tag)] if tagged else [],
        payload=payload,
    )
    client.request("POST", "/events", json=[message.model_dump(mode="json")])
    return str(message.id)


def deployments_waiting(client: Any, event: str, resource: str) -> list[str]:
    """Names of the enabled automations that run a deployment on this event.

    Args:
        resource: id of the resource that the event is about.
    """
    automations: list[Any] = []
    page: list[Any] | None = None
    while page is None or len(page) == _PAGE:
        page = client.read_automations(limit=_PAGE, offset=len(automations))
        automations += page
    return sorted(
        automation.name
        for automation in automations
        if automation.enabled
        and any(action.type == "run-deployment" for action in automation.actions)
        and _expects(automation.trigger, event, {"prefect.resource.id": resource})
    )


_PAGE = 200


def _expects(trigger: Any, event: str, resource: dict[str, str]) -> bool:
    """Whether a trigger, or a part of it, matches an event without related resources."""
    if inner := getattr(trigger, "triggers", None):
        return any(_expects(part, event, resource) for part in inner)
    expected = getattr(trigger, "expect", None)
    if expected is None or (expected and not any(fnmatchcase(event, pattern) for pattern in expected)):
        return False
    related = getattr(trigger, "match_related", None)
    return trigger.match.matches(Resource(resource)) and not (related and _root(related))


def _root(specification: Any) -> Any:
    """The labels of a specification, or of the first in a list."""
    first = specification[0] if isinstance(specification, list) else specification
    return getattr(first, "root", first)


def promotion_refused(client: Any, model: str, version: str, message: str) -> str:
    """Send the event of a refused promotion, whose message an alert forwards; returns the event's id."""
    payload = {"model": model, "version": version, "message": message}
    return send(client, PROMOTION_REFUSED, f"dpo.model.{model}", model, payload, tagged=True)
