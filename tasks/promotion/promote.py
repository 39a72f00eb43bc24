"""Promotion and rollback: who is champion, decided on what a run measured and written down with the reasons.

On one machine a file lock in the workspace lets promotions wait for each other; across machines the ledger
decides (see `tasks.promotion.ledger`). Weights are read and compared with their digest before they become
champion.
"""

import getpass
import logging
import os
import socket
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from pydantic import Field

from dpo_core.config import Config
from dpo_core.errors import PromotionRefused, RecipeError
from tasks.promotion.finished_run import finished_report, registry_of
from tasks.promotion.ledger import ALIAS, PREVIOUS, SUFFIX, Change, Ledger, hold_champion, reigns
from tasks.promotion.model_source import titled, weights_of
from tasks.reports.alarms import alarms
from tasks.reports.run_report import ModelRow, RunReport
from tasks.store.files import disk_errors, open_workspace
from tasks.store.manifest import digest_folder
from tasks.tracking.mlflow_calls import every
from tasks.tracking.registry import version_of
from tasks.tracking.tracker import Tracker

log = logging.getLogger("dpo")

_LOOK = "Look with: dpo promote --check"
_CHALLENGER = "challenger"


class Standing(Config):
    """Who holds which alias of a registered model."""

    name: str
    champion: str | None
    previous: str | None
    challenger: str | None
    changed: bool = False
    """Whether this call changed the champion."""
    change: Change | None = None
    """The last change that the ledger knows."""
    notes: list[str] = Field(default_factory=list)
    """What was mended, and what is not as it should be."""
    sound: bool = True
    """Whether the champion's weights, where these were checked, are those that were registered."""


def promote(workspace: str | Path, run_id: str, *, force: bool = False, reason: str = "") -> Standing:
    """Make a run's model the champion. Where it is that already, nothing changes.

    Args:
        run_id: a finished alignment run.
        force: promote against the rules, or a decision that was made on another champion; what was overridden
            is written down. A version or weights that are not there cannot be forced.
        reason: why, in own words; kept with the change.

    Raises:
        PromotionRefused: a rule failed, the champion is another one than the run was held against, the
            version or its weights are gone or damaged, or another promotion came first.
        RecipeError: there is no such run, or it is not finished, damaged, or a study.
    """
    place = open_workspace(workspace)
    report, model = finished_report(place, run_id)
    tracker = registry_of(place, report)
    with hold_champion(place, model.name):
        ledger, mended = _settled(tracker, model.name)
        entries = ledger.read()
        champion = version_of(tracker, model.name, ALIAS)
        candidate = ledger.version(str(model.version))
        if candidate is None or not _made_by(candidate, report, model):
            problem = f"{model.name} version {model.version}, which the run {run_id} registered, is not there"
            refuse(
                problem,
                ["it was deleted, or this is another registry"],
                "Run it again: " + report.run.command,
            )
        if champion is not None and champion.version == candidate.version:
            return _standing(tracker, model.name, notes=mended)
        against = objections(report, model, champion)
        mended += [f"alarm  {alarm.name}: {alarm.message}" for alarm in alarms(report)]
        if against and not force:
            again = f"Hold it against the present champion by running it again: {report.run.command}"
            remedy = (
                again
                if _stale(report, champion)
                else "Its page shows the numbers; --force overrides the rules, on record."
            )
            refuse(f"{titled(candidate)} is not promoted", against, remedy)
        _check_weights(candidate)
        replaced = None if champion is None else str(champion.version)
        change = Change(
            kind="promotion",
            name=model.name,
            version=str(candidate.version),
            replaced=replaced,
            previous=replaced,
            run=run_id,
            forced=bool(against),
            overridden=against,
            reason=reason,
            decision=report.decision,
            after=entries[-1].number if entries else 0,
            **_signature(),
        )
        return _write(tracker, ledger, change, mended)


def rollback(workspace: str | Path, name: str | None = None, *, reason: str = "") -> Standing:
    """Make the previous champion the champion again.

    Args:
        name: the registered model; without it, the only one that has a champion.

    Raises:
        PromotionRefused: there is no previous champion, its weights are gone or damaged, or another promotion
            came first.
        RecipeError: there is no such model, or a name is needed.
    """
    place = open_workspace(workspace)
    tracker = registry_of(place)
    name = _only(tracker, name)
    with hold_champion(place, name):
        ledger, mended = _settled(tracker, name)
        entries = ledger.read()
        champion, target = (version_of(tracker, name, alias) for alias in (ALIAS, PREVIOUS))
        if target is None or (champion is not None and champion.version == target.version):
            refuse(f"{name} has no previous champion", [], "Promote another run's model: dpo promote RUN")
        _check_weights(target)
        change = Change(
            kind="rollback",
            name=name,
            version=str(target.version),
            replaced=None if champion is None else str(champion.version),
            previous=_below(ledger, str(target.version)),
            run=next((e.change.run for e in entries if e.change.version == str(target.version)), None),
            reason=reason,
            after=entries[-1].number if entries else 0,
            **_signature(),
        )
        return _write(tracker, ledger, change, mended)


def check(workspace: str | Path) -> list[Standing]:
    """Finish what a killed promotion left, and tell of every registered model who is champion."""
    place = open_workspace(workspace)
    tracker = registry_of(place)
    found = []
    for name in _models(tracker):
        with hold_champion(place, name):
            ledger, notes = _settled(tracker, name)
            champion = version_of(tracker, name, ALIAS)
            if (wanted := ledger.moved()) is not None:
                notes.append(
                    f"the alias {ALIAS} was moved by hand: the last change made version {wanted} champion"
                )
            sound = True
            try:
                if champion is not None:
                    _check_weights(champion)
            except PromotionRefused as error:
                sound = False
                notes.append(str(error))
            found.append(_standing(tracker, name, notes=notes).model_copy(update={"sound": sound}))
    return found


def objections(report: RunReport, model: ModelRow, champion: Any | None) -> list[str]:
    """All that stands against a promotion, a sentence each; empty where nothing does."""
    decision = report.decision
    if decision is None:
        return ["no decision was made in this run"]
    found = [f"{reason.rule}: {reason.text}" for reason in decision.reasons if not reason.passed]
    if not decision.promote and not found:
        found.append("the decision of the run is not to promote")
    if champion is not None and champion.tags.get("dpo.artifact_sha256") == model.sha256:
        found.append(f"the weights are those of the champion, {titled(champion)}")
    elif _stale(report, champion):
        now = "there is no champion now" if champion is None else f"the champion is {titled(champion)} now"
        found.append(f"it was held against {decision.champion}, and {now}")
    return found


def _stale(report: RunReport, champion: Any | None) -> bool:
    """Whether the decision was made on another champion than the present one."""
    present = "the reference" if champion is None else titled(champion)
    return report.decision is not None and report.decision.champion != present


def refuse(problem: str, reasons: list[str], remedy: str) -> NoReturn:
    """Every refused promotion and rollback ends here."""
    told = f"{problem}: {'; '.join(reasons)}" if reasons else problem
    raise PromotionRefused(told, remedy)


def _write(tracker: Tracker, ledger: Ledger, change: Change, notes: list[str]) -> Standing:
    if not ledger.append(change):
        first = ledger.read()[-1].change
        problem = f"the {change.kind} of {change.name} version {change.version} came too late"
        refuse(f"{problem}: version {first.version} became champion meanwhile", [], _LOOK)
    ledger.settle()
    return _standing(tracker, change.name, changed=True, notes=notes)


def _settled(tracker: Tracker, name: str) -> tuple[Ledger, list[str]]:
    ledger = Ledger(tracker, name)
    change = ledger.settle()
    if change is None:
        return ledger, []
    note = f"finished the {change.kind} of {name} version {change.version}, which was cut off"
    log.warning(note)
    return ledger, [note]


def _below(ledger: Ledger, version: str) -> str | None:
    """The champion before this one, of those that are still registered."""
    stack = reigns(ledger.read())
    while stack and stack.pop() != version:
        pass
    return next((earlier for earlier in reversed(stack) if ledger.version(earlier) is not None), None)


def _check_weights(version: Any) -> None:
    """Refuse a version whose files are not, byte by byte, those that were registered."""
    folder, wanted = weights_of(version), version.tags.get("dpo.artifact_sha256")
    place = version.tags.get("dpo.weights_uri", "an unknown place")
    if folder is None or not wanted:
        problem = f"the files of {titled(version)} are not on this machine: {place}"
        refuse(problem, [], "Go on where they are, or run again what made them.")
    with disk_errors(folder, "reading the weights"):
        found = digest_folder(folder)
    if found != wanted:
        digests = f"has the digest {found[:12]}, not {wanted[:12]}"
        problem = f"the weights of {titled(version)} are damaged: {place} {digests}"
        refuse(problem, [], "Run again what made them: a damaged artifact is made anew.")


def _made_by(version: Any, report: RunReport, model: ModelRow) -> bool:
    """Whether the registered version is the run's model, or has its weights from an earlier run."""
    same_run = model.known or version.run_id == report.run.mlflow_run_id
    return same_run and version.tags.get("dpo.artifact_sha256") == model.sha256


def _signature() -> dict[str, Any]:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user need not have a name
        user = str(os.getuid())
    return {"at": datetime.now(UTC), "by": f"{user}@{socket.gethostname()}", "mark": uuid.uuid4().hex}


def _standing(tracker: Tracker, name: str, *, changed: bool = False, notes: list[str]) -> Standing:
    def holder(alias: str) -> str | None:
        version = version_of(tracker, name, alias)
        return None if version is None else str(version.version)

    entries = Ledger(tracker, name).read()
    return Standing(
        name=name,
        champion=holder(ALIAS),
        previous=holder(PREVIOUS),
        challenger=holder(_CHALLENGER),
        changed=changed,
        change=entries[-1].change if entries else None,
        notes=notes,
    )


def _models(tracker: Tracker) -> list[str]:
    found = tracker.ask("the registered models", lambda client: every(client.search_registered_models))
    return sorted(model.name for model in found if not model.name.endswith(SUFFIX))


def _only(tracker: Tracker, name: str | None) -> str:
    names = _models(tracker)
    if name is not None:
        if name not in names:
            raise RecipeError(f"there is no registered model {name}", f"Known: {', '.join(names) or 'none'}")
        return name
    having = [known for known in names if version_of(tracker, known, ALIAS) or Ledger(tracker, known).read()]
    if len(having) == 1:
        return having[0]
    if not having:
        refuse("no registered model has a champion", [], "Promote one with: dpo promote RUN")
    raise RecipeError(f"{len(having)} models have a champion: {', '.join(having)}", "Name one of them.")
