"""Promotion and rollback: check a run's decision, make its model the champion, and record the reasons.

On one machine a file lock in the workspace serialises promotions; across machines the ledger decides (see
`tasks.promotion.ledger`). The digest of the weights is verified before they become champion.
"""

import getpass
import logging
import os
import socket
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from pydantic import Field

from dpo_core.config import Config
from dpo_core.errors import PromotionRefused, RecipeError
from tasks.promotion.finished_run import finished_report, registry_of
from tasks.promotion.ledger import (
    ALIAS,
    PREVIOUS,
    ChampionChange,
    Ledger,
    champion_history,
    hold_champion,
    registered_models,
)
from tasks.promotion.model_source import model_of_version, require_intact, version_title
from tasks.reports.alarms import alarms
from tasks.reports.run_report import ModelRow, RunReport
from tasks.store.files import open_workspace
from tasks.tracking.registry import version_of
from tasks.tracking.tracker import Tracker

log = logging.getLogger("dpo")

_SEE_CHAMPION = "See the current champion with: dpo promote --check"
_CHALLENGER = "challenger"


class ModelVersions(Config):
    """The versions of a registered model that have the aliases champion, previous-champion and challenger."""

    name: str
    champion: str | None
    previous: str | None
    challenger: str | None
    changed: bool = False
    """Whether this call changed the champion."""
    change: ChampionChange | None = None
    """The last change in the ledger."""
    notes: list[str] = Field(default_factory=list)
    """Interrupted changes that were completed, and problems."""
    sound: bool = True
    """False if the champion's weights were checked and differ from the registered ones."""


def promote(workspace: str | Path, run_id: str, *, force: bool = False, reason: str = "") -> ModelVersions:
    """Make a run's model the champion. Does nothing if it already is.

    Args:
        run_id: a finished alignment run.
        force: promote although a rule failed, or although the run was compared with an earlier champion; the
            overridden objections are recorded. A missing version or missing weights cannot be forced.
        reason: free text; recorded with the change.

    Raises:
        PromotionRefused: a rule failed, the run was compared with another champion than the present one, the
            version or its weights are missing or damaged, or another promotion was recorded first.
        RecipeError: the run does not exist, is unfinished, is a study, or its report is damaged.
    """
    place = open_workspace(workspace)
    report, model = finished_report(place, run_id)
    tracker = registry_of(place, report)
    with hold_champion(place, model.name):
        ledger, notes = _settled(tracker, model.name)
        entries = ledger.read()
        champion = version_of(tracker, model.name, ALIAS)
        candidate = ledger.version(str(model.version))
        if candidate is None or not _made_by(candidate, report, model):
            refuse(
                f"{model.name} version {model.version}, registered by the run {run_id}, does not exist",
                ["it was deleted, or MLflow uses another registry"],
                "Run it again: " + report.run.command,
            )
        if champion is not None and champion.version == candidate.version:
            return _standing(tracker, model.name, notes=notes)
        against = objections(report, model, champion)
        notes += [f"alarm  {alarm.name}: {alarm.message}" for alarm in alarms(report)]
        if against and not force:
            remedy = (
                f"Run it again to compare it with the present champion: {report.run.command}"
                if _stale(report, champion)
                else "The run page shows the numbers. --force promotes anyway and records what it overrode."
            )
            refuse(f"{version_title(candidate)} is not promoted", against, remedy)
        _check_weights(tracker, candidate)
        replaced = None if champion is None else str(champion.version)
        change = ChampionChange(
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
        return _record(tracker, ledger, change, notes)


def rollback(workspace: str | Path, name: str | None = None, *, reason: str = "") -> ModelVersions:
    """Make the previous champion the champion again.

    Args:
        name: the registered model; may be left out if only one model has a champion.

    Raises:
        PromotionRefused: there is no previous champion, its weights are missing or damaged, or another
            promotion was recorded first.
        RecipeError: the model does not exist, or several models have a champion and no name was given.
    """
    place = open_workspace(workspace)
    tracker = registry_of(place)
    name = _model_with_champion(tracker, name)
    with hold_champion(place, name):
        ledger, notes = _settled(tracker, name)
        entries = ledger.read()
        champion, target = (version_of(tracker, name, alias) for alias in (ALIAS, PREVIOUS))
        if target is None or (champion is not None and champion.version == target.version):
            refuse(f"{name} has no previous champion", [], "Promote another run's model: dpo promote RUN")
        _check_weights(tracker, target)
        change = ChampionChange(
            kind="rollback",
            name=name,
            version=str(target.version),
            replaced=None if champion is None else str(champion.version),
            previous=_previous_champion(ledger, str(target.version)),
            run=next((e.change.run for e in entries if e.change.version == str(target.version)), None),
            reason=reason,
            after=entries[-1].number if entries else 0,
            **_signature(),
        )
        return _record(tracker, ledger, change, notes)


def check(workspace: str | Path) -> list[ModelVersions]:
    """Complete interrupted promotions, verify the champions' weights, and list every model's champion."""
    place = open_workspace(workspace)
    tracker = registry_of(place)
    standings = []
    for name in (model.name for model in registered_models(tracker)):
        with hold_champion(place, name):
            ledger, notes = _settled(tracker, name)
            champion = version_of(tracker, name, ALIAS)
            if (recorded := ledger.moved()) is not None:
                notes.append(
                    f"the alias {ALIAS} was moved by hand: the last change made version {recorded} champion"
                )
            sound = True
            try:
                if champion is not None:
                    _check_weights(tracker, champion)
            except PromotionRefused as error:
                sound = False
                notes.append(str(error))
            standings.append(_standing(tracker, name, notes=notes).model_copy(update={"sound": sound}))
    return standings


def objections(report: RunReport, model: ModelRow, champion: Any | None) -> list[str]:
    """The reasons against a promotion, one sentence each; empty if there are none."""
    decision = report.decision
    if decision is None:
        return ["this run made no decision"]
    against = [f"{reason.rule}: {reason.text}" for reason in decision.reasons if not reason.passed]
    if not decision.promote and not against:
        against.append("the decision of the run is not to promote")
    if champion is not None and champion.tags.get("dpo.artifact_sha256") == model.sha256:
        against.append(f"the weights are those of the champion, {version_title(champion)}")
    elif _stale(report, champion):
        now = (
            "there is no champion now"
            if champion is None
            else f"the champion is {version_title(champion)} now"
        )
        against.append(f"it was compared with {decision.champion}, but {now}")
    return against


def _stale(report: RunReport, champion: Any | None) -> bool:
    """Whether the decision compared the model with another champion than the present one."""
    present = "the reference" if champion is None else version_title(champion)
    return report.decision is not None and report.decision.champion != present


def refuse(problem: str, reasons: list[str], remedy: str) -> NoReturn:
    """Raise PromotionRefused with the problem, its reasons and the remedy."""
    message = f"{problem}: {'; '.join(reason.rstrip('.') for reason in reasons)}" if reasons else problem
    raise PromotionRefused(message, remedy)


def _record(tracker: Tracker, ledger: Ledger, change: ChampionChange, notes: list[str]) -> ModelVersions:
    if not ledger.append(change):
        first = ledger.read()[-1].change
        problem = f"the {change.kind} of {change.name} version {change.version} was rejected"
        refuse(f"{problem}: version {first.version} was promoted concurrently", [], _SEE_CHAMPION)
    ledger.settle()
    return _standing(tracker, change.name, changed=True, notes=notes)


def _settled(tracker: Tracker, name: str) -> tuple[Ledger, list[str]]:
    ledger = Ledger(tracker, name)
    change = ledger.settle()
    if change is None:
        return ledger, []
    note = f"completed the interrupted {change.kind} of {name} version {change.version}"
    log.warning(note)
    return ledger, [note]


def _previous_champion(ledger: Ledger, version: str) -> str | None:
    """The champion before this version, among those that are still registered."""
    stack = champion_history(ledger.read())
    while stack and stack.pop() != version:
        pass
    return next((earlier for earlier in reversed(stack) if ledger.version(earlier) is not None), None)


def _check_weights(tracker: Tracker, version: Any) -> None:
    """Refuse a version whose files are missing or differ from those that were registered."""
    try:
        model = model_of_version(tracker, version)
        require_intact(model.path, model.origin.sha256, model.origin.title)
    except RecipeError as error:
        raise PromotionRefused(error.problem, error.remedy) from error


def _made_by(version: Any, report: RunReport, model: ModelRow) -> bool:
    """Whether the registered version holds the run's weights, registered by this run or by an earlier one."""
    same_run = model.known or version.run_id == report.run.mlflow_run_id
    return same_run and version.tags.get("dpo.artifact_sha256") == model.sha256


def _signature() -> dict[str, Any]:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # in a container the user may have no name
        user = str(os.getuid())
    return {"at": datetime.now(UTC), "by": f"{user}@{socket.gethostname()}"}


def _standing(tracker: Tracker, name: str, *, changed: bool = False, notes: list[str]) -> ModelVersions:
    def holder(alias: str) -> str | None:
        version = version_of(tracker, name, alias)
        return None if version is None else str(version.version)

    entries = Ledger(tracker, name).read()
    return ModelVersions(
        name=name,
        champion=holder(ALIAS),
        previous=holder(PREVIOUS),
        challenger=holder(_CHALLENGER),
        changed=changed,
        change=entries[-1].change if entries else None,
        notes=notes,
    )


def _model_with_champion(tracker: Tracker, name: str | None) -> str:
    names = [model.name for model in registered_models(tracker)]
    if name is not None:
        if name not in names:
            raise RecipeError(f"there is no registered model {name}", f"Known: {', '.join(names) or 'none'}")
        return name
    promoted = [
        model for model in names if version_of(tracker, model, ALIAS) or Ledger(tracker, model).read()
    ]
    if len(promoted) == 1:
        return promoted[0]
    if not promoted:
        refuse("no registered model has a champion", [], "Promote one with: dpo promote RUN")
    raise RecipeError(f"{len(promoted)} models have a champion: {', '.join(promoted)}", "Name one of them.")
