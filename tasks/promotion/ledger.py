"""The ledger of champions: every change of the registry's alias `champion`, in one order for all machines.

MLflow's registry has no transaction over aliases and no compare-and-set: an alias is an upsert, the last
writer wins, and both writers read back success. One thing in it is atomic on every SQL store: a version's
number. `create_model_version` inserts number and tags in one transaction under a primary key, so that of two
writers at once one gets the next number and the other the one after it. The ledger is therefore a registered
model of its own, `<name>.promotions`. Its entry n holds one change and the number of the entry it was decided
on; it counts if that was the last one that counts. All readers come to the same answer, so one of two
promotions that were decided on the same champion is void, on whatever machines they ran.

Creating the entry is the promotion. `settle` then writes a tag and the aliases. These writes can be repeated,
and the alias `champion` moves in the last write but one. If a process is killed in between, the next
promotion, rollback or check completes its entry. A concurrency limit of a Prefect server cannot take its
place: a machine may use the registry and no Prefect server.

Two limits remain. An alias that somebody moved by hand in MLflow is not in the ledger and is used as it is.
And if two machines apply the same entry and one of them pauses for longer than the next promotion takes, it
sets the alias to an old champion and corrects that with its next call; if it is killed between these two
calls, the alias stays on the old champion, which `Ledger.moved` reports.
"""

import logging
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn
from urllib.parse import quote

from mlflow.exceptions import MlflowException
from pydantic import AwareDatetime, Field, ValidationError

from dpo_core.config import Config
from dpo_core.errors import StageFailed
from dpo_core.evaluation.decision import Decision
from tasks.store.locks import locked
from tasks.tracking.connection import all_pages, create_if_missing
from tasks.tracking.mlflow_run import TAG_CHARS, cut
from tasks.tracking.registry import numbered, version_of
from tasks.tracking.tracker import Tracker

log = logging.getLogger("dpo")

ALIAS = "champion"
PREVIOUS = "previous-champion"
SUFFIX = ".promotions"
_CHANGE, _STATE = "dpo.change", "dpo.state"
_UPSERTS = 5
_LOCK_SECONDS = 900.0
_ABOUT = "Changes of the champion of {name}, one a version. Written by `dpo promote` and `dpo rollback`."


class ChampionChange(Config):
    """One change of the champion: an entry of the ledger."""

    kind: Literal["promotion", "rollback"]
    name: str
    """The registered model."""
    version: str
    """Its new champion."""
    replaced: str | None
    """The champion before the change."""
    previous: str | None
    """The version that gets the alias `previous-champion`."""
    at: AwareDatetime
    by: str
    run: str | None = None
    """The run whose model was promoted."""
    forced: bool = False
    """Whether `--force` overrode objections."""
    overridden: list[str] = Field(default_factory=list)
    """The objections that `--force` overrode."""
    reason: str = ""
    """The reason that the user gave."""
    decision: Decision | None = None
    after: int
    """Number of the last entry when this change was decided; 0 if there was none."""


class NumberedChange(NamedTuple):
    """A change with its place in the ledger."""

    number: int
    change: ChampionChange
    state: str
    """Empty until the change is applied, then `done`."""


class Ledger:
    """The changes of one registered model's champion."""

    def __init__(self, tracker: Tracker, name: str) -> None:
        self._tracker, self.model = tracker, name
        self.name = name + SUFFIX

    def read(self) -> list[NumberedChange]:
        """The valid entries in order. An entry is valid if it was decided on the last valid one before it."""
        query = f"name = '{self.name}'"
        versions = self._tracker.ask(
            f"the ledger of {self.model}", lambda c: list(c.search_model_versions(query))
        )
        return _valid([entry for version in versions if (entry := _entry(version)) is not None])

    def append(self, change: ChampionChange) -> bool:
        """Record a change, which makes it effective. Returns False if another change was recorded first."""
        source = f"models:/{self.model}/{change.version}"
        about = _ABOUT.format(name=self.model)

        def write(client: Any) -> str:
            create_if_missing(lambda: client.create_registered_model(self.name, description=about))
            run_id = client.get_model_version(self.model, change.version).run_id
            tags = {_CHANGE: change.model_dump_json()}
            entry = client.create_model_version(
                self.name, source, run_id=run_id, tags=tags, description=sentence(change)
            )
            return str(entry.version)

        number = self._tracker.ask(f"the {change.kind} of {self.model}", write)
        # Compare changes, not numbers: after a lost answer one change may have two entries, the first valid.
        won = any(entry.change == change for entry in self.read())
        if not won:
            self._tracker.ask("a void entry", lambda c: c.delete_model_version(self.name, number))
        return won

    def settle(self) -> ChampionChange | None:
        """Apply the last change if it is not applied yet, and return it; None if there was nothing to do."""
        applied: NumberedChange | None = None
        while True:
            entries = self.read()
            if not entries:
                return None
            last = entries[-1]
            if applied.number == last.number if applied else last.state:
                return applied.change if applied else None
            # If a later change was recorded meanwhile, apply it again: our alias may have overwritten its.
            self._apply(last)
            applied = last

    def moved(self) -> str | None:
        """The ledger's champion if the alias names another version, else None."""
        entries = [entry for entry in self.read() if entry.state == "done"]
        champion = version_of(self._tracker, self.model, ALIAS)
        recorded = entries[-1].change.version if entries else None
        return recorded if recorded and (champion is None or str(champion.version) != recorded) else None

    def version(self, number: str) -> Any | None:
        """A registered version of the model; None if it was deleted."""
        return numbered(self._tracker, self.model, number)

    def _apply(self, entry: NumberedChange) -> None:
        change = entry.change
        if self.version(change.version) is None:
            log.warning(
                "%s: version %s was deleted, so it does not become champion", self.model, change.version
            )
        else:
            self._tag(self.model, change.version, "dpo.promotion", sentence(change))
            previous = change.previous if change.previous and self.version(change.previous) else None
            self._point(PREVIOUS, previous)
            self._point(ALIAS, change.version)
        self._tag(self.name, str(entry.number), _STATE, "done")

    def _point(self, alias: str, version: str | None) -> None:
        def write(client: Any) -> None:
            if version is None:
                client.delete_registered_model_alias(self.model, alias)
            else:
                client.set_registered_model_alias(self.model, alias, version)

        self._upsert(f"the alias {alias}", write)

    def _tag(self, model: str, version: str, key: str, value: str) -> None:
        what = f"the tag {key} of {model} version {version}"
        self._upsert(what, lambda client: client.set_model_version_tag(model, version, key, value))

    def _upsert(self, what: str, write: Callable[[Any], None]) -> None:
        """Write a tag or an alias that another process may be writing at the same time.

        MLflow checks whether the row exists and then inserts it. Of two processes that do so at once, one
        violates the primary key; it has to try again.
        """

        def again(client: Any) -> None:
            for _ in range(_UPSERTS):
                try:
                    return write(client)
                except MlflowException as error:
                    if error.error_code != "BAD_REQUEST":
                        raise
                    time.sleep(random.uniform(0.05, 0.2))
            return write(client)

        self._tracker.ask(what, again)


def registered_models(tracker: Tracker) -> list[Any]:
    """The registered models by name, without the ledgers."""
    models = tracker.ask("the registered models", lambda client: all_pages(client.search_registered_models))
    return sorted((m for m in models if not m.name.endswith(SUFFIX)), key=lambda model: model.name)


def champion_of(tracker: Tracker, name: str) -> Any | None:
    """The champion's version, or None. Writes nothing: if the last change is not applied yet, its version is
    returned, else the version with the alias."""
    ledger = Ledger(tracker, name)
    pending = [entry.change.version for entry in ledger.read()[-1:] if not entry.state]
    version = ledger.version(pending[0]) if pending else None
    return version_of(tracker, name, ALIAS) if version is None else version


def champion_history(entries: list[NumberedChange]) -> list[str]:
    """The champions that a rollback can go back to, oldest first, the present one last.

    A promotion appends its version. A rollback removes the versions after its target, so that two rollbacks
    in a row go back two steps, never to the model that was rolled back.
    """
    stack: list[str] = []
    for change in (entry.change for entry in entries):
        if change.replaced and stack[-1:] != [change.replaced]:
            stack.append(change.replaced)  # somebody moved the alias by hand
        if change.kind == "promotion":
            stack.append(change.version)
        else:
            while stack and stack[-1] != change.version:
                stack.pop()
            stack = stack or [change.version]
    return stack


def sentence(change: ChampionChange) -> str:
    """One line that describes a change."""
    verb = "promoted" if change.kind == "promotion" else "brought back"
    forced = " by force" if change.forced else ""
    instead = f" in place of version {change.replaced}" if change.replaced else ""
    why = f": {change.reason}" if change.reason else ""
    return cut(
        f"{change.name} version {change.version} {verb}{forced}{instead} by {change.by}{why}", TAG_CHARS
    )


def _entry(version: Any) -> NumberedChange | None:
    """The entry that a registered version holds; None for a version that this code did not write."""
    try:
        change = ChampionChange.model_validate_json(version.tags[_CHANGE])
    except (KeyError, ValidationError):
        return None
    return NumberedChange(int(version.version), change, version.tags.get(_STATE, ""))


def _valid(entries: list[NumberedChange]) -> list[NumberedChange]:
    valid: list[NumberedChange] = []
    for entry in sorted(entries, key=lambda entry: entry.number):
        if entry.change.after == (valid[-1].number if valid else 0):
            valid.append(entry)
    return valid


@contextmanager
def hold_champion(workspace: Path, name: str) -> Iterator[None]:
    """Lock the model's champion against other processes of this workspace. Released if the process dies."""
    path = workspace / "store" / "locks" / f"promotion-{quote(name, safe='')}.lock"

    def busy(who: str) -> NoReturn:
        raise StageFailed(
            f"another promotion of {name} has held the lock for {_LOCK_SECONDS / 60:.0f} minutes ({who})",
            "Wait for that process or end it, then try again.",
        )

    with locked(path, "locking the champion", busy, patience=_LOCK_SECONDS):
        yield
