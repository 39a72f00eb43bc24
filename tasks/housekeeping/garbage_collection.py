"""Garbage collection (`dpo gc`): removes artifacts, working folders and Data Docs that no kept run needs.

It keeps the artifacts that a kept run references and everything these were made from, so that the run stays
fully cached; models that a registry alias or a possible rollback refers to; and separately evaluated models.
Run folders and MLflow keep the evidence of every run.

Garbage is first hidden by renames under the store's guard, index entries first. A kill in between leaves
objects without an entry, which the next call removes, but never an entry without its object. Only then are
bytes deleted.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

from dpo_core.config import Config
from dpo_core.errors import RecipeError
from tasks.promotion.finished_run import registries_of
from tasks.promotion.ledger import SUFFIX, Ledger, hold_champion
from tasks.runs.references import UsedArtifacts, read_references
from tasks.store.facts import ModelFacts, facts_of
from tasks.store.files import disk_errors, open_workspace, size_of
from tasks.store.store import Store
from tasks.tracking.mlflow_calls import all_pages
from tasks.tracking.tracker import Tracker

KEEP = 10
"""Default number of finished runs that stay cached."""


class Unused(Config):
    """An artifact to remove."""

    kind: str
    sha256: str
    bytes: int


class Freed(Config):
    """The result of a garbage collection, or of its dry run."""

    kept: list[str]
    """Runs that stay cached."""
    let_go: list[str]
    """Runs that do not stay cached. Their pages and records are kept, their artifacts only if others need
    them."""
    unused: list[Unused]
    """Artifacts that no kept run or model needs."""
    entries: int
    """Index entries removed with them."""
    leftovers: list[str]
    """Working folders, unfinished files and Data Docs that no run will use."""
    freed_bytes: int
    """Bytes of the artifacts and leftovers."""
    held_back: list[str]
    """Unfinished runs of older versions, whose references are unknown. While there are any, nothing in the
    store is freed."""


class _Entry(NamedTuple):
    path: Path
    stage: str
    key: str
    sha256: str
    parents: tuple[str, ...]
    weights: str | None


class _Removal(NamedTuple):
    """The paths to remove."""

    entries: list[Path]
    objects: list[Path]
    folders: list[Path]


def free(
    workspace: str | Path,
    *,
    keep: int = KEEP,
    keep_runs: Iterable[str] = (),
    drop_runs: Iterable[str] = (),
    dry_run: bool = False,
) -> Freed:
    """Remove everything that no kept run needs.

    Args:
        keep: number of finished runs to keep, the newest ones.
        keep_runs: further runs to keep.
        drop_runs: runs not to keep, even if they are new, unfinished or studies.
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
        if dry_run:
            return _select(
                store, _runs_to_keep(before, done_before, keep, keep_runs, drop_runs), before, champions
            )[0]
        with store._temporary() as trash, store.guard():
            # Runs that started or ended meanwhile keep their references: a model may be registered by now.
            now = read_references(place)
            kept = _runs_to_keep(now, done_before, keep, keep_runs, drop_runs)
            freed, going = _select(store, kept, now, champions)
            _hide(going, trash)
    return freed


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
) -> list[UsedArtifacts]:
    """The runs that stay cached."""
    done = [(n.record.started_at, n.run_id) for n in runs if n.record and n.finished and not n.is_study]
    done = sorted(((at, run) for at, run in done if run in done_before), reverse=True)
    old = {run for _, run in done[keep:]} - keep_runs
    return [run for run in runs if run.run_id not in old | drop_runs]


def _champions(place: Path, runs: list[UsedArtifacts], locks: ExitStack, dry_run: bool) -> set[str]:
    """Digests of the models that an alias or a champion's last change refers to; locks promotions."""
    digests: set[str] = set()
    for tracker in registries_of(place, (run.tracking_uri for run in runs)):
        names = tracker.ask("the registered models", lambda c: all_pages(c.search_registered_models))
        for name in sorted(model.name for model in names if not model.name.endswith(SUFFIX)):
            if not dry_run:
                locks.enter_context(hold_champion(place, name))
            digests |= _named_weights(tracker, name)
    return digests


def _named_weights(tracker: Tracker, name: str) -> set[str]:
    model = tracker.ask(f"the model {name}", lambda client: client.get_registered_model(name))
    ledger = Ledger(tracker, name)
    changes = [entry.change for entry in ledger.read()[-1:] if entry.state != "abandoned"]
    # The last change may not have been applied yet.
    named = {*model.aliases.values(), *(v for c in changes for v in (c.version, c.previous, c.replaced) if v)}
    digests = set()
    for number in sorted(str(version) for version in named):
        version = ledger.version(number)
        if version is not None:
            digests.add(version.tags.get("dpo.artifact_sha256", ""))
            digests.add(Path(version.tags.get("dpo.weights_uri", "")).name)
    return digests


def _select(
    store: Store, kept: list[UsedArtifacts], runs: list[UsedArtifacts], champions: set[str]
) -> tuple[Freed, _Removal]:
    """Select what to remove; changes nothing."""
    entries, broken = _entries(store)
    unknown = [run.run_id for run in kept if not run.complete]
    keys = {key for run in kept for key in run.keys}
    referenced = {digest for run in kept for digest in run.digests}
    needed = _closure(entries, referenced | {e.sha256 for e in entries if (e.stage, e.key) in keys})
    evaluated = _evaluated(store.workspace)
    needed |= champions | {e.sha256 for e in entries if e.weights in evaluated}
    going = [] if unknown else [e for e in entries if e.sha256 not in needed]
    objects = [] if unknown else [o for o in _objects(store) if o.name not in needed]
    folders = store.leftovers()
    if not unknown:
        stay = [e for e in entries if e.sha256 in needed]
        folders += _scratch(store, keys, {(e.stage, e.key) for e in stay}) + _docs(store, keys, stay)
    sizes = {path: size_of(path) for path in (*objects, *folders)}
    freed = Freed(
        kept=sorted(run.run_id for run in kept),
        let_go=sorted({run.run_id for run in runs} - {run.run_id for run in kept}),
        unused=[Unused(kind=o.parent.parent.name, sha256=o.name, bytes=sizes[o]) for o in objects],
        entries=len(going) + len(broken),
        leftovers=[str(folder.relative_to(store.workspace)) for folder in folders],
        freed_bytes=sum(sizes.values()),
        held_back=unknown,
    )
    return freed, _Removal([e.path for e in going] + broken, objects, folders)


def _entries(store: Store) -> tuple[list[_Entry], list[Path]]:
    """The entries of the store's index, and the paths of unreadable ones."""
    entries, broken = [], []
    for path in sorted((store.root / "index").glob("*/*.json")):
        manifest = store._read_index(path, forget=False)
        if manifest is None:
            broken.append(path)
            continue
        own = (path, path.parent.name, path.stem, manifest.sha256, manifest.parents)
        entries.append(_Entry(*own, facts_of(manifest, ModelFacts).weights_sha256))
    return entries, broken


def _closure(entries: list[_Entry], wanted: set[str]) -> set[str]:
    """These artifacts and all their ancestors."""
    parents: dict[str, set[str]] = {}
    for entry in entries:
        parents.setdefault(entry.sha256, set()).update(entry.parents)
    closure: set[str] = set()
    pending = list(wanted)
    while pending:
        digest = pending.pop()
        if digest not in closure:
            closure.add(digest)
            pending += parents.get(digest, ())
    return closure


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


def _scratch(store: Store, keys: set[tuple[str, str]], finished: set[tuple[str, str]]) -> list[Path]:
    """Working folders of finished stages, and of stages that no unfinished run references."""
    in_work = {(stage, key[:16]) for stage, key in keys - finished}
    folders = sorted((store.workspace / "work").glob("*/*"))
    return [folder for folder in folders if (folder.parent.name, folder.name) not in in_work]


def _docs(store: Store, keys: set[tuple[str, str]], stay: list[_Entry]) -> list[Path]:
    """Data Docs folders (one per validation) whose data are removed."""
    named = {key[:16] for _, key in keys} | {entry.key[:16] for entry in stay}
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
