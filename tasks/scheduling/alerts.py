"""Alerts: Prefect automations that send a message when a run fails, crashes, is late or is refused.

The address is a secret. It is stored in a block of the server and never shown or logged.
"""

import asyncio
from typing import Any

from apprise import Apprise
from prefect.blocks.notifications import SlackWebhook
from prefect.blocks.webhook import Webhook
from prefect.events.actions import CallWebhook, SendNotification
from prefect.events.schemas.automations import AutomationCore, EventTrigger
from prefect.events.schemas.events import ResourceSpecification
from prefect.exceptions import ObjectNotFound
from pydantic import SecretStr

from dpo_core.errors import RecipeError
from tasks.scheduling.automations import Change, Step, automation_fields, automation_step, removal
from tasks.scheduling.deployment_file import MADE_BY

TAG = "dpo"
"""Tag of the runs that alerts report; every deployment in the shipped file has it."""
BLOCK = "dpo-notify"
_SLUGS = {"webhook", "slack-webhook"}
NONE = "none"
"""Given in place of an address, this removes all alerts."""
PREFIX = "dpo alert: "
PROMOTION_REFUSED = "dpo.promotion.refused"

# Prefect emits an event for each state that a run enters, named after it; flows.deployed names the refusals.
ALERTS = {
    "failed": ["prefect.flow-run.Failed", "prefect.flow-run.TimedOut"],
    "crashed": ["prefect.flow-run.Crashed"],
    "late": ["prefect.flow-run.Late"],
    "refused by the gate": ["prefect.flow-run.GateRefused"],
    "promotion refused": ["prefect.flow-run.PromotionRefused", PROMOTION_REFUSED],
}

_RUN = "{{ deployment.name }} {{ flow_run.name }}"
_TEXT = (
    "{% if flow_run %}" + _RUN + ": {{ flow_run.state.message or flow_run.state.name }} "
    "({{ flow_run|ui_url }}){% else %}{{ event.payload.message }}{% endif %}"
)


def _block(url: str) -> Any:
    """A Prefect block with the address: a webhook, or an address that Apprise supports.

    Raises:
        RecipeError: Apprise does not support the address.
    """
    slack = "hooks.slack" in url
    if url.startswith(("http://", "https://")) and not slack:
        # The proxies of some receivers reject a body without a content type.
        return Webhook(url=SecretStr(url), headers={"Content-Type": "application/json"})
    if not Apprise().add(url):
        scheme = url.partition(":")[0] if ":" in url else "nothing"
        raise RecipeError(
            f"the alert address is not supported (it begins with {scheme})",
            "Give a webhook (https://…) or an Apprise address (slack://…, mailto://…)",
        )
    # Prefect has no block for arbitrary Apprise addresses; the Slack block passes any address to Apprise.
    return SlackWebhook(url=SecretStr(url))


# The body of a webhook; `tojson` quotes the text.
_JSON = (
    "{% set text %}" + _TEXT + "{% endset %}"
    '{"alert": "KIND", "event": {{ event.event|tojson }}, "text": {{ text|tojson }}}'
)


def _action(block_id: Any, kind: str, slug: str) -> Any:
    if slug == "webhook":
        return CallWebhook(block_document_id=block_id, payload=_JSON.replace("KIND", kind))
    return SendNotification(block_document_id=block_id, subject=f"dpo: {kind}", body=_TEXT)


def _automation(kind: str, action: Any) -> Any:
    trigger = EventTrigger(
        expect=set(ALERTS[kind]),
        match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*", "dpo.model.*"]}),
        match_related=ResourceSpecification(
            {"prefect.resource.id": f"prefect.tag.{TAG}", "prefect.resource.role": "tag"}
        ),
    )
    description = f"Tells of runs with the tag {TAG}. {MADE_BY}"
    return AutomationCore(name=PREFIX + kind, description=description, trigger=trigger, actions=[action])


def plan_alerts(client: Any, automations: list[Any], url: str | None) -> tuple[list[Step], list[str]]:
    """The steps that make the server send alerts to an address, without the address itself, and notes.

    Args:
        automations: all automations of the server.
        url: the address; `none` removes all alerts; None or "" leaves them unchanged.
    """
    existing = {one.name: one for one in automations if one.name.startswith(PREFIX)}
    if not url:
        return [], [] if existing else ["no alert is sent when a run fails: set DPO_NOTIFY_URL"]
    block = None if url == NONE else _block(url)
    slug = block.get_block_type_slug() if block else ""
    steps = [_block_removal(client, other) for other in _SLUGS - {slug}]
    if block:
        document = _read(client, slug)
        if document is None or document.data.get("url") != url:
            kind: Any = "changed" if document else "added"
            change = Change(kind=kind, place="alert address", old="another", new="the given one")
            steps.append(Step([change], lambda: asyncio.run(block.asave(BLOCK, overwrite=bool(document)))))
        for name in ALERTS:

            def make(name: str = name) -> Any:
                return _automation(name, _action(_read(client, slug).id, name, slug))

            old = existing.pop(PREFIX + name, None)
            fresh = bool(old and document and automation_fields(old) == automation_fields(make()))
            steps.append(automation_step(client, old, make, PREFIX + name, fresh))
    return steps + [removal(client, one, name) for name, one in existing.items()], []


def _read(client: Any, slug: str) -> Any:
    """The stored block of this kind, or None."""
    try:
        return client.read_block_document_by_name(BLOCK, slug, include_secrets=True)
    except ObjectNotFound:
        return None


def _block_removal(client: Any, slug: str) -> Step:
    document = _read(client, slug)
    if document is None:
        return Step([], lambda: None)
    change = Change(kind="removed", place="alert address")
    return Step([change], lambda: client.delete_block_document(document.id))
