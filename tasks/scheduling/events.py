"""Events that do not come from a flow run: sent in one request, so that a server that is away is noticed."""

from fnmatch import fnmatchcase
from typing import Any

from tasks.scheduling.alerts import PROMOTION_REFUSED, TAG


def send(
    client: Any, event: str, resource: str, name: str, payload: dict[str, Any], *, tagged: bool = False
) -> str:
    """Send one event; returns its number.

    Args:
        client: a synchronous client of the server.
        resource: what the event is about; triggers match on it.
        tagged: relate it to the tag whose runs are told of.
    """
    from datetime import UTC, datetime

    from prefect.events.schemas.events import Event, RelatedResource, Resource

    tag = {"prefect.resource.id": f"prefect.tag.{TAG}", "prefect.resource.role": "tag"}
    made = Event(
        event=event,
        occurred=datetime.now(UTC),
        resource=Resource({"prefect.resource.id": resource, "prefect.resource.name": name}),
        related=[RelatedResource(tag)] if tagged else [],
        payload=payload,
    )
    client.request("POST", "/events", json=[made.model_dump(mode="json")])
    return str(made.id)


def deployments_waiting(client: Any, event: str, resource: str) -> list[str]:
    """Names of the automations that are switched on and run a deployment on such an event.

    Args:
        resource: what the event is about.
    """
    found: list[Any] = []
    page: list[Any] | None = None
    while page is None or len(page) == _PAGE:
        page = client.read_automations(limit=_PAGE, offset=len(found))
        found += page
    return sorted(
        automation.name
        for automation in found
        if automation.enabled
        and any(action.type == "run-deployment" for action in automation.actions)
        and _expects(automation.trigger, event, {"prefect.resource.id": resource})
    )


_PAGE = 200


def _expects(trigger: Any, event: str, resource: dict[str, str]) -> bool:
    """Whether a trigger, or a part of it, waits for an event that is related to nothing."""
    from prefect.events.schemas.events import Resource

    if inner := getattr(trigger, "triggers", None):
        return any(_expects(part, event, resource) for part in inner)
    expected = getattr(trigger, "expect", None)
    if expected is None or (expected and not any(fnmatchcase(event, pattern) for pattern in expected)):
        return False
    related = getattr(trigger, "match_related", None)
    return trigger.match.matches(Resource(resource)) and not (related and _root(related))


def _root(specification: Any) -> Any:
    """The labels of a specification, or of the first of several."""
    first = specification[0] if isinstance(specification, list) else specification
    return getattr(first, "root", first)


def promotion_refused(client: Any, model: str, version: str, message: str) -> str:
    """Say that a version was not made champion; the alert of that name passes on the message."""
    payload = {"model": model, "version": version, "message": message}
    return send(client, PROMOTION_REFUSED, f"dpo.model.{model}", model, payload, tagged=True)
