"""Changes to a Prefect server, and the comparison of its automations with those that are wanted."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from dpo_core.config import Config

_PAGE = 200


class Change(Config):
    """One difference between what is wanted and the server."""

    kind: Literal["added", "changed", "removed"]
    place: str
    """`nightly`, `nightly schedule every-night`, `dpo alert: failed`."""
    old: str | None = None
    new: str | None = None

    def __str__(self) -> str:
        if self.kind == "changed":
            return f"~ {self.place}: {self.old} -> {self.new}"
        return f"{'+' if self.kind == 'added' else '-'} {self.place}"


@dataclass(frozen=True)
class Step:
    """Changes that are made together."""

    changes: list[Change]
    apply: Callable[[], object]


def read_automations(client: Any) -> list[Any]:
    """All automations of the server."""
    automations: list[Any] = []
    page: list[Any] | None = None
    while page is None or len(page) == _PAGE:
        page = client.read_automations(limit=_PAGE, offset=len(automations))
        automations += page
    return automations


def automation_fields(automation: Any) -> dict[str, Any]:
    """The fields by which automations are compared: all but the ids of what they refer to."""
    ids = {"id", "deployment_id", "block_document_id"}
    trigger = automation.trigger.model_dump(mode="json", exclude=ids)
    return {
        "description": automation.description,
        "enabled": automation.enabled,
        # Sort the lists that Prefect makes from sets.
        "trigger": {key: sorted(v) if isinstance(v, list) else v for key, v in trigger.items()},
        "actions": [a.model_dump(mode="json", exclude=ids, exclude_none=True) for a in automation.actions],
    }


def differences(place: str, new: dict[str, Any], old: dict[str, Any]) -> Iterator[Change]:
    """The fields whose values differ."""
    for field in sorted(new.keys() | old.keys()):
        if new.get(field) != old.get(field):
            before, after = _short(old.get(field)), _short(new.get(field))
            yield Change(kind="changed", place=f"{place} {field}", old=before, new=after)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return text if len(text) <= 120 else f"{text[:120]} …"


def automation_step(client: Any, existing: Any, make: Callable[[], Any], name: str, fresh: bool) -> Step:
    """Create or update an automation.

    Args:
        existing: the automation of that name on the server, or None.
        make: makes the wanted automation, when the step is applied.
        fresh: whether the existing one is as wanted.
    """
    if existing is None:
        return Step([Change(kind="added", place=name)], lambda: client.create_automation(make()))
    changes = [] if fresh else [Change(kind="changed", place=name, old="another", new="of this version")]
    return Step(changes, lambda: client.update_automation(existing.id, make()))


def removal(client: Any, automation: Any, place: str) -> Step:
    """Delete an automation."""
    return Step([Change(kind="removed", place=place)], lambda: client.delete_automation(automation.id))
