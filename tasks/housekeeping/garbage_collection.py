"""Garbage collection (`dpo gc`): removes what no kept run, no named model and no recent use needs.

Of the store it keeps the artifacts that a kept run references and everything these were made from, so that
the run stays fully cached; models that a registry alias or a possible rollback refers to; models that were
evaluated; and models that were converted lately. Of the caches see `caches`. Run folders, reports and MLflow
keep the evidence of every run.

Garbage of the store is first hidden by renames under the store's guard, index entries first. A kill in
between leaves objects without an entry, which the next call removes, but never an entry without its object.
Only then are bytes deleted.
"""

import errno
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

from dpo_core.config import Config
from dpo_core.errors import RecipeError
from tasks.housekeeping.caches import DAY_SECONDS, UNUSED_DAYS, clean_caches
from tasks.housekeeping.findings import Kept, Removed
from tasks.promotion.finished_run import registries_of
from tasks.promotion.ledger import Ledger, hold_champion, registered_models
from tasks.runs.references import UsedArtifacts, read_references
from tasks.store.facts import ModelFacts, facts_of
from tasks.store.files import CONVERT_MODEL, disk_errors, open_workspace, size_of
from tasks.store.locks import is_held
from tasks.store.store import Store
from tasks.tracking.tracker import Tracker

KEEP = 10
"""Default number of finished runs that stay cached."""


class Freed(Config):
    """The result of a garbage collection, or of its dry run."""

    kept: list[Kept]
    dropped_runs: list[str]
    """Runs that do not stay cached. Their pages and records are kept, their artifacts only if others need
    them."""
    removed: list[Removed]
    merged: dict[str, int]
    """Number of shards merged into one, by the key of their cache of reference log-probs."""
    freed_bytes: int


class _Entry(NamedTuple):
    """An entry of the store's index."""

    path: Path
    stage: str
    key: str
    sha256: str
    parents: tuple[str, ...]
    weights: str | None


class _Needs(NamedTuple):
    """Something that is kept, why, and the artifacts that it needs apart from their ancestors."""

    what: str
    why: str
    digests: set[str]


class _Removal(NamedTuple):
    """The paths to remove from the store; of folders with the reason."""

    entries: list[Path]
    objects: list[Path]
    folders: dict[Path, str]


def free(
    workspace: str | Path,
    *,
    keep: int = KEEP,
    keep_runs: Iterable[str] = (),
    drop_runs: Iterable[str] = (),
    unused_days: float = UNUSED_DAYS,
    dry_run: bool = False,
) -> Freed:
    """Remove everything that is not needed.

    Args:
        keep: number of finished runs to keep, the newest ones.
        keep_runs: further runs to keep.
        drop_runs: runs not to keep, even if they are new, unfinished or studies.
        unused_days: remove what was not used for so many days from the caches.
        dry_run: change nothing, only return what would be removed.

    Raises:
        RecipeError: a named run does not exist, or the workspace is not readable or writable.
        StageFailed: an MLflow registry that may have champions does not answer.
    """
    place = open_workspace(workspace)
    store = Store(place)
    keep_runs, drop_runs = set(keep_runs), set(drop_runs)
    with disk_errors(place, "freeing the store"), ExitStack() as locks:
        before = read_references(place)
        _require_known(place, before, keep_runs, drop_runs)
        done_before = {run.run_id for run in before if run.finished}
        champions = _champions(place, before, locks, dry_run)

        def select(runs: list[UsedArtifacts]) -> tuple[Freed, _Removal]:
            kept = _runs_to_keep(runs, done_before, keep, keep_runs, drop_runs)
            return _select(store, kept, runs, champions, time.time() - unused_days * DAY_SECONDS)

        if dry_run:
            freed, _ = select(before)
        else:
            with store.temporary() as trash, store.guard():
                # Runs that started or ended meanwhile keep their references.
                freed, removal = select(read_references(place))
                _hide(removal, trash)
        caches = clean_caches(place, unused_days=unused_days, dry_run=dry_run)
    removed = freed.removed + caches.removed
    return freed.model_copy(
        update={
            "kept": freed.kept + caches.kept,
            "removed": removed,
            "merged": caches.merged,
            "freed_bytes": sum(item.bytes for item in removed),
        }
    )


def _require_known(place: Path, runs: list[UsedArtifacts], keep_runs: set[str], drop_runs: set[str]) -> None:
    known = {run.run_id: run for run in runs}
    for name in sorted(keep_runs | drop_runs):
        if name not in known:
            raise RecipeError(
                f"the workspace {place} has no run named {name}", "List its runs with: dpo runs --all"
            )
        record = known[name].record
        if name in drop_runs and record and record.status == "running" and not record.is_abandoned:
            raise RecipeError(f"the run {name} is in progress", "Stop it, or wait until it ends")
        if name in keep_runs & drop_runs:
            problem = f"the run {name} is in both --keep-run and --drop-run"
            raise RecipeError(problem, "Remove it from one of them")


def _runs_to_keep(
    runs: list[UsedArtifacts], done_before: set[str], keep: int, keep_runs: set[str], drop_runs: set[str]
) -> list[tuple[UsedArtifacts, str]]:
    """The runs that stay cached, newest first, each with the reason."""
    done = [(n.record.started_at, n.run_id) for n in runs if n.record and n.finished and not n.is_study]
    done = sorted(((at, run) for at, run in done if run in done_before), reverse=True)
    newest, old = [run for _, run in done[:keep]], {run for _, run in done[keep:]}
    kept = []
    for run in runs:
        if run.run_id in drop_runs or (run.run_id in old and run.run_id not in keep_runs):
            continue
        own = "study" if run.is_study else "newest" if run.finished else "unfinished"
        kept.append((run, "named" if run.run_id in keep_runs else own))
    return sorted(kept, key=lambda item: newest.index(item[0].run_id) if item[0].run_id in newest else keep)


def _champions(place: Path, runs: list[UsedArtifacts], locks: ExitStack, dry_run: bool) -> list[_Needs]:
    """The models that an alias or a champion's last change refers to; locks promotions."""
    needs = []
    for tracker in registries_of(place, (run.tracking_uri for run in runs)):
        for model in registered_models(tracker):
            if not dry_run:
                locks.enter_context(hold_champion(place, model.name))
            needs += _named_versions(tracker, model.name)
    return needs


def _named_versions(tracker: Tracker, name: str) -> list[_Needs]:
    model = tracker.ask(f"the model {name}", lambda client: client.get_registered_model(name))
    ledger = Ledger(tracker, name)
    named: dict[str, str] = {}
    for entry in ledger.read()[-1:]:  # it may not have been applied yet
        change = entry.change
        named |= {v: "rollback" for v in (change.previous, change.replaced) if v} | {
            change.version: "champion"
        }
    named |= {str(number): alias for alias, number in model.aliases.items()}
    needs = []
    for number, why in sorted(named.items()):
        version = ledger.version(number)
        if version is not None:
            uri = version.tags.get("dpo.weights_uri", "")
            digests = {version.tags.get("dpo.artifact_sha256", ""), Path(uri).name}
            needs.append(_Needs(f"{name} version {number}", why, digests))
    return needs


def _select(
    store: Store,
    kept: list[tuple[UsedArtifacts, str]],
    runs: list[UsedArtifacts],
    champions: list[_Needs],
    recent: float,
) -> tuple[Freed, _Removal]:
    """Select what to remove from the store; changes nothing.

    Args:
        recent: models that were converted or used since then are kept, in seconds since 1970.
    """
    entries, broken = _entries(store)
    keys = {key for run, _ in kept for key in run.keys}
    needs = [*_needs_of_runs(kept, entries), *champions, *_needed_models(store.workspace, entries, recent)]
    there = {path.name: path for path in _objects(store)}
    kept_items, needed = _first_needs(needs, entries, there)
    finished = {(e.stage, e.key) for e in entries if e.sha256 in needed}
    folders = dict.fromkeys(store.leftovers(), "unfinished") | _scratch(store, keys, finished)
    folders |= dict.fromkeys(_docs(store, keys | finished), "unused")
    removal = _Removal(
        entries=[e.path for e in entries if e.sha256 not in needed] + broken,
        objects=[path for name, path in there.items() if name not in needed],
        folders=folders,
    )
    removed = [
        Removed(what=f"{path.parent.parent.name} {path.name[:16]}", why="unused", bytes=size_of(path))
        for path in removal.objects
    ] + [
        Removed(what=str(path.relative_to(store.workspace)), why=why, bytes=size_of(path))
        for path, why in removal.folders.items()
    ]
    freed = Freed(
        kept=kept_items,
        dropped_runs=sorted({run.run_id for run in runs} - {run.run_id for run, _ in kept}),
        removed=removed,
        merged={},
        freed_bytes=0,
    )
    return freed, removal


def _needs_of_runs(kept: list[tuple[UsedArtifacts, str]], entries: list[_Entry]) -> list[_Needs]:
    by_key = {(entry.stage, entry.key): entry.sha256 for entry in entries}
    return [
        _Needs(f"run {run.run_id}", why, {*run.digests, *(by_key[key] for key in run.keys & by_key.keys())})
        for run, why in kept
    ]


def _needed_models(workspace: Path, entries: list[_Entry], recent: float) -> list[_Needs]:
    """Models that were evaluated, and those that were converted lately."""
    evaluated, needs = _evaluated(workspace), []
    for entry in entries:
        used = entry.stage == CONVERT_MODEL and entry.path.stat().st_mtime >= recent
        if entry.weights in evaluated or used:
            why = "recent" if used else "evaluated"
            needs.append(_Needs(f"model {entry.sha256[:16]}", why, {entry.sha256}))
    return needs


def _entries(store: Store) -> tuple[list[_Entry], list[Path]]:
    """The entries of the store's index, and the paths of unreadable ones."""
    entries, broken = [], []
    for path in sorted((store.root / "index").glob("*/*.json")):
        manifest = store.read_entry(path)
        if manifest is None:
            broken.append(path)
            continue
        own = (path, path.parent.name, path.stem, manifest.sha256, manifest.parents)
        entries.append(_Entry(*own, facts_of(manifest, ModelFacts).weights_sha256))
    return entries, broken


def _first_needs(
    needs: list[_Needs], entries: list[_Entry], there: dict[str, Path]
) -> tuple[list[Kept], set[str]]:
    """What is kept with the artifacts that nothing before it needs, and the digests of all that is needed."""
    parents: dict[str, set[str]] = {}
    for entry in entries:
        parents.setdefault(entry.sha256, set()).update(entry.parents)
    needed: set[str] = set()
    kept = []
    for need in needs:
        own, pending = set(), list(need.digests)
        while pending:
            digest = pending.pop()
            if digest not in needed:
                needed.add(digest)
                own.add(digest)
                pending += parents.get(digest, ())
        paths = [there[digest] for digest in own & there.keys()]
        kept.append(Kept(what=need.what, why=need.why, bytes=sum(map(size_of, paths))))
    return kept, needed


def _evaluated(workspace: Path) -> set[str]:
    """Digests of the weights in reports of `dpo evaluate` and `dpo compare`."""
    digests = set()
    for path in (workspace / "evaluations").glob("*/report.json"):
        with suppress(OSError, ValueError, KeyError, TypeError):
            digests |= {model["sha256"] for model in json.loads(path.read_bytes())["models"]}
    return digests


def _objects(store: Store) -> Iterator[Path]:
    """Every object of the store; folders whose name is not a digest are skipped."""
    digits = set("0123456789abcdef")
    for path in sorted((store.root / "objects").glob("*/*/*")):
        if len(path.name) == 64 and set(path.name) <= digits:
            yield path


def _scratch(store: Store, keys: set[tuple[str, str]], finished: set[tuple[str, str]]) -> dict[Path, str]:
    """Working folders of finished stages, and of stages that no unfinished run references.

    Not those that are in use: `dpo evaluate` and `dpo compare` work in folders of which no run has a record.
    """
    in_work = {(stage, key[:16]) for stage, key in keys - finished}
    done = {(stage, key[:16]) for stage, key in finished}
    return {
        folder: "finished" if (folder.parent.name, folder.name) in done else "unused"
        for folder in sorted((store.workspace / "work").glob("*/*"))
        if (folder.parent.name, folder.name) not in in_work
        and not any(map(is_held, (store.root / "locks").glob(f"{folder.parent.name}-{folder.name}*.lock")))
    }


def _docs(store: Store, keys: set[tuple[str, str]]) -> list[Path]:
    """Data Docs folders (one per validation) whose data are removed."""
    named = {key[:16] for _, key in keys}
    folders = sorted((store.workspace / "data_docs").glob("*-*"))
    return [folder for folder in folders if folder.name.rpartition("-")[2] not in named]


def _hide(going: _Removal, trash: Path) -> None:
    for path in going.entries:
        path.unlink(missing_ok=True)
    for number, path in enumerate((*going.objects, *going.folders)):
        try:
            os.rename(path, trash / str(number))
        except FileNotFoundError:  # a stage that ends removes its own folder
            continue
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            shutil.rmtree(path, ignore_errors=True)  # a working folder on another disk cannot be renamed
