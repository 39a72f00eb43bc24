"""Automations that tell people: which ends of a run are worth a message, and where it goes.

The address is a secret: it is kept in a block of the server, and never shown, logged or compared in the open.
"""

from typing import Any

from dpo_core.errors import RecipeError
from tasks.scheduling.deployments import MADE_BY, Change, automation_fields

TAG = "dpo"
"""Tag of the runs that are told of; those of every deployment in the shipped file have it."""
BLOCK = "dpo-notify"
_SLUGS = {"webhook", "slack-webhook"}
NONE = "none"
"""In place of an address: nobody is to be told."""
PREFIX = "dpo alert: "
PROMOTION_REFUSED = "dpo.promotion.refused"

# Prefect makes an event of each state that a run enters, named after it; flows.deployed names the refusals.
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
    """The block that holds the address: a plain webhook, or one that Apprise sends to.

    Raises:
        RecipeError: Apprise does not know the kind of address.
    """
    from apprise import Apprise
    from prefect.blocks.notifications import SlackWebhook
    from prefect.blocks.webhook import Webhook
    from pydantic import SecretStr

    slack = "hooks.slack" in url
    if url.startswith(("http://", "https://")) and not slack:
        # Proxies of some receivers refuse a body of no type.
        return Webhook(url=SecretStr(url), headers={"Content-Type": "application/json"})
    if not Apprise().add(url):
        scheme = url.partition(":")[0] if ":" in url else "nothing"
        raise RecipeError(
            f"no message can be sent to the given address (it begins with {scheme})",
            "Give a webhook (https://…) or an Apprise address (slack://…, mailto://…)",
        )
    # Prefect has no block for any Apprise address; this one passes on whatever is not Slack's.
    return SlackWebhook(url=SecretStr(url))


# The body of a webhook; `tojson` quotes whatever the text holds.
_JSON = (
    "{% set text %}" + _TEXT + "{% endset %}"
    '{"alert": "KIND", "event": {{ event.event|tojson }}, "text": {{ text|tojson }}}'
)


def _action(block_id: Any, kind: str, url: str) -> Any:
    from prefect.events.actions import CallWebhook, SendNotification

    if _is_webhook(url):
        return CallWebhook(block_document_id=block_id, payload=_JSON.replace("KIND", kind))
    return SendNotification(block_document_id=block_id, subject=f"dpo: {kind}", body=_TEXT)


def _automation(kind: str, action: Any) -> Any:
    from prefect.events.schemas.automations import AutomationCore, EventTrigger
    from prefect.events.schemas.events import ResourceSpecification

    trigger = EventTrigger(
        expect=set(ALERTS[kind]),
        match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*", "dpo.model.*"]}),
        match_related=ResourceSpecification(
            {"prefect.resource.id": f"prefect.tag.{TAG}", "prefect.resource.role": "tag"}
        ),
    )
    told = f"Tells of runs with the tag {TAG}. {MADE_BY}"
    return AutomationCore(name=PREFIX + kind, description=told, trigger=trigger, actions=[action])


def plan_alerts(client: Any, url: str | None) -> tuple[list[Change], list[str]]:
    """What `apply_alerts` would change, without the address itself, and what a person should know.

    Args:
        url: where to send; `none` takes all alerts away, nothing leaves them as they are.
    """
    here = _ours(client)
    if url == NONE:
        return [Change(kind="removed", place=name) for name in here], []
    if not url:
        return [], [] if here else ["nobody is told of runs that fail: set DPO_NOTIFY_URL"]
    document = _document(client, url)
    changes = []
    if document is None:
        changes.append(Change(kind="added", place="alert address"))
    elif document.data.get("url") != url:
        changes.append(Change(kind="changed", place="alert address", old="another", new="the given one"))
    for kind in ALERTS:
        found = here.pop(PREFIX + kind, None)
        place = PREFIX + kind
        if found is None:
            changes.append(Change(kind="added", place=place))
        elif not (document and _same(found, kind, document.id, url)):
            changes.append(Change(kind="changed", place=place, old="another", new="of this version"))
    return changes + [Change(kind="removed", place=name) for name in here], []


def apply_alerts(client: Any, url: str | None) -> None:
    """Keep the address in its block, and make each automation once; or take them away."""
    here = _ours(client)
    if url and url != NONE:
        document = _document(client, url)
        if document is None or document.data.get("url") != url:
            document = _kept(client, url, document)
        for kind in ALERTS:
            found = here.get(PREFIX + kind)
            if found is not None and _same(found, kind, document.id, url):
                del here[PREFIX + kind]
            else:
                client.create_automation(_automation(kind, _action(document.id, kind, url)))
    for stale in here.values():
        client.delete_automation(stale.id)
    for slug in _SLUGS - ({_block(url).get_block_type_slug()} if url and url != NONE else set()):
        if document := _read(client, slug):
            client.delete_block_document(document.id)


def _ours(client: Any) -> dict[str, Any]:
    return {one.name: one for one in client.read_automations() if one.name.startswith(PREFIX)}


def _same(found: Any, kind: str, block_id: Any, url: str) -> bool:
    wanted = _automation(kind, _action(block_id, kind, url))
    return automation_fields(found) == automation_fields(wanted)


def _is_webhook(url: str) -> bool:
    return bool(_block(url).get_block_type_slug() == "webhook")


def _document(client: Any, url: str) -> Any:
    """The block that holds an address of this kind, if there is one."""
    return _read(client, _block(url).get_block_type_slug())


def _read(client: Any, slug: str) -> Any:
    from prefect.exceptions import ObjectNotFound

    try:
        return client.read_block_document_by_name(BLOCK, slug, include_secrets=True)
    except ObjectNotFound:
        return None


def _kept(client: Any, url: str, document: Any) -> Any:
    import asyncio

    block = _block(url)
    asyncio.run(block.asave(BLOCK, overwrite=document is not None))
    return _read(client, block.get_block_type_slug())
