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
from tasks.scheduling.deployments import MADE_BY, Change, automation_fields

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


def _action(block_id: Any, kind: str, url: str) -> Any:
    if _is_webhook(url):
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


def plan_alerts(client: Any, url: str | None) -> tuple[list[Change], list[str]]:
    """The changes that `apply_alerts` would make, without the address itself, and notes for the user.

    Args:
        url: the address; `none` removes all alerts; None or "" leaves them unchanged.
    """
    existing = _existing(client)
    if url == NONE:
        return [Change(kind="removed", place=name) for name in existing], []
    if not url:
        return [], [] if existing else ["no alert is sent when a run fails: set DPO_NOTIFY_URL"]
    document = _document(client, url)
    changes = []
    if document is None:
        changes.append(Change(kind="added", place="alert address"))
    elif document.data.get("url") != url:
        changes.append(Change(kind="changed", place="alert address", old="another", new="the given one"))
    for kind in ALERTS:
        automation = existing.pop(PREFIX + kind, None)
        place = PREFIX + kind
        if automation is None:
            changes.append(Change(kind="added", place=place))
        elif not (document and _is_current(automation, kind, document.id, url)):
            changes.append(Change(kind="changed", place=place, old="another", new="of this version"))
    return changes + [Change(kind="removed", place=name) for name in existing], []


def apply_alerts(client: Any, url: str | None) -> None:
    """Store the address in its block and create each automation once; with `none`, remove them."""
    existing = _existing(client)
    if url and url != NONE:
        document = _document(client, url)
        if document is None or document.data.get("url") != url:
            document = _save(client, url, document)
        for kind in ALERTS:
            automation = existing.get(PREFIX + kind)
            if automation is not None and _is_current(automation, kind, document.id, url):
                del existing[PREFIX + kind]
            else:
                client.create_automation(_automation(kind, _action(document.id, kind, url)))
    for stale in existing.values():
        client.delete_automation(stale.id)
    for slug in _SLUGS - ({_block(url).get_block_type_slug()} if url and url != NONE else set()):
        if document := _read(client, slug):
            client.delete_block_document(document.id)


def _existing(client: Any) -> dict[str, Any]:
    automations = client.read_automations()
    return {automation.name: automation for automation in automations if automation.name.startswith(PREFIX)}


def _is_current(automation: Any, kind: str, block_id: Any, url: str) -> bool:
    wanted = _automation(kind, _action(block_id, kind, url))
    return automation_fields(automation) == automation_fields(wanted)


def _is_webhook(url: str) -> bool:
    return bool(_block(url).get_block_type_slug() == "webhook")


def _document(client: Any, url: str) -> Any:
    """The stored block for this kind of address, or None."""
    return _read(client, _block(url).get_block_type_slug())


def _read(client: Any, slug: str) -> Any:
    try:
        return client.read_block_document_by_name(BLOCK, slug, include_secrets=True)
    except ObjectNotFound:
        return None


def _save(client: Any, url: str, document: Any) -> Any:
    block = _block(url)
    asyncio.run(block.asave(BLOCK, overwrite=document is not None))
    return _read(client, block.get_block_type_slug())
