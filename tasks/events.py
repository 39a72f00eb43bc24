"""Events that do not come from a flow run: sent in one request, so that a server that is away is noticed."""

from typing import Any

from tasks.alerts import PROMOTION_REFUSED, TAG


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


def promotion_refused(client: Any, model: str, version: str, message: str) -> str:
    """Say that a version was not made champion; the alert of that name passes on the message."""
    payload = {"model": model, "version": version, "message": message}
    return send(client, PROMOTION_REFUSED, f"dpo.model.{model}", model, payload, tagged=True)
