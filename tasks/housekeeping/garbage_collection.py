"""What of a workspace no kept run needs, and its removal.

Kept is what a kept run's records name, and all that this was made from, so that the run stays cached from
end to end; what an alias of the registry points at, and what a rollback goes back to; and models that were
evaluated by themselves. Run folders and MLflow keep the evidence of every run.

Everything goes out of sight under the store's guard, index entries first: a kill in between leaves objects
without an entry, which the next call frees, and never an entry without its object. An object leaves in one
rename. Only then are bytes removed.
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
from tasks.runs.references import Needs, read_needs
from tasks.store.facts import ModelFacts, facts_of
from tasks.store.files import disk_errors, open_workspace, size_of
from tasks.store.store import Store
from tasks.tracking.mlflow_calls import every
from tasks.tracking.tracker import Tracker

KEEP = 10
"""Finished runs that stay cached, where nothing else is said."""


class Unused(Config):
    """An artifact that goes."""

    kind: str
    sha256: str
    bytes: int


class Freed(Config):
    """What `gc` did, or would do."""

    kept: list[str]
    """Runs that stay cached."""
    let_go: list[str]
    """Runs that do not: their pages and records stay, what they made goes unless others need it."""
    unused: list[Unused]
    """Artifacts that nothing kept needs."""
    entries: int
    """Results of stages that are forgotten with them."""
    leftovers: list[str]
    """Working folders and unfinished files that nobody will go on with, and pages of Data Docs."""
    freed_bytes: int
    """Bytes of all that."""
    held_back: list[str]
    """Unfinished runs of an older version, which do not say what they need: with them, nothing of the store
    is freed."""


class _Entry(NamedTuple):
    path: Path
    stage: str
    key: str
    sha256: str
    parents: tuple[str, ...]
    weights: str | None


class _Going(NamedTuple):
    """What is to be taken away, by paths."""

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
    """Remove what no kept run needs.

    Args:
        keep: so many finished runs, the newest.
        keep_runs: runs to keep besides.
        drop_runs: runs to let go, though they are new, unfinished or studies.
        dry_run: only say what would be done.

    Raises:
        RecipeError: there is no such run, or the workspace cannot be read or written.
        StageFailed: an MLflow that may know champions does not answer.
    """
    place = open_workspace(workspace)
    store = Store(place)
    keep_runs, drop_runs = set(keep_runs), set(drop_runs)
    with disk_errors(place, "freeing the store"), ExitStack() as held:
        before = read_needs(place)
        _require_known(place, before, keep_runs, drop_runs)
        done_before = {needs.run_id for needs in before if needs.finished}
        champions = _champions(place, before, held, dry_run)
        if dry_run:
            return _look(store, _kept(before, done_before, keep, keep_runs, drop_runs), before, champions)[0]
        with store._temporary() as trash, store.guard():
            # Who began, or ended, since then keeps what it needs: its model may be registered by now.
            now = read_needs(place)
            kept = _kept(now, done_before, keep, keep_runs, drop_runs)
            told, going = _look(store, kept, now, champions)
            _hide(going, trash)
    return told


def _require_known(place: Path, runs: list[Needs], keep_runs: set[str], drop_runs: set[str]) -> None:
    known = {needs.run_id: needs for needs in runs}
    for name in sorted(keep_runs | drop_runs):
        if name not in known:
            raise RecipeError(
                f"the workspace {place} has no run named {name}", "List its runs with: dpo runs --all"
            )
        record = known[name].record
        if name in drop_runs and record and record.status == "running" and not record.is_abandoned:
            raise RecipeError(f"the run {name} is at work", "Stop it first, or wait for its end")
        if name in keep_runs & drop_runs:
            raise RecipeError(f"the run {name} is both to be kept and to be let go", "Say one of them")


def _kept(
    runs: list[Needs], done_before: set[str], keep: int, keep_runs: set[str], drop_runs: set[str]
) -> list[Needs]:
    """The runs that stay cached."""
    done = [(n.record.started_at, n.run_id) for n in runs if n.record and n.finished and not n.is_study]
    done = sorted(((at, run) for at, run in done if run in done_before), reverse=True)
    old = {run for _, run in done[keep:]} - keep_runs
    return [needs for needs in runs if needs.run_id not in old | drop_runs]


def _champions(place: Path, runs: list[Needs], held: ExitStack, dry_run: bool) -> set[str]:
    """Artifacts of models that an alias, or the last change of the champion, names; promotions wait."""
    digests: set[str] = set()
    for tracker in registries_of(place, (needs.tracking_uri for needs in runs)):
        names = tracker.ask("the registered models", lambda c: every(c.search_registered_models))
        for name in sorted(model.name for model in names if not model.name.endswith(SUFFIX)):
            if not dry_run:
                held.enter_context(hold_champion(place, name))
            digests |= _named_weights(tracker, name)
    return digests


def _named_weights(tracker: Tracker, name: str) -> set[str]:
    model = tracker.ask(f"the model {name}", lambda client: client.get_registered_model(name))
    ledger = Ledger(tracker, name)
    changes = [entry.change for entry in ledger.read()[-1:] if entry.state != "abandoned"]
    # The last change may not have been carried out yet.
    named = {*model.aliases.values(), *(v for c in changes for v in (c.version, c.previous, c.replaced) if v)}
    found = set()
    for number in sorted(str(version) for version in named):
        version = ledger.version(number)
        if version is not None:
            found.add(version.tags.get("dpo.artifact_sha256", ""))
            found.add(Path(version.tags.get("dpo.weights_uri", "")).name)
    return found


def _look(store: Store, kept: list[Needs], runs: list[Needs], champions: set[str]) -> tuple[Freed, _Going]:
    """What goes; touches nothing."""
    entries, broken = _entries(store)
    silent = [needs.run_id for needs in kept if not needs.told]
    keys = {key for needs in kept for key in needs.keys}
    asked = {digest for needs in kept for digest in needs.digests}
    wanted = _closure(entries, asked | {e.sha256 for e in entries if (e.stage, e.key) in keys})
    evaluated = _evaluated(store.workspace)
    wanted |= champions | {e.sha256 for e in entries if e.weights in evaluated}
    going = [] if silent else [e for e in entries if e.sha256 not in wanted]
    objects = [] if silent else [o for o in _objects(store) if o.name not in wanted]
    folders = store.leftovers()
    if not silent:
        stay = [e for e in entries if e.sha256 in wanted]
        folders += _scratch(store, keys, {(e.stage, e.key) for e in stay}) + _docs(store, keys, stay)
    sizes = {path: size_of(path) for path in (*objects, *folders)}
    told = Freed(
        kept=sorted(needs.run_id for needs in kept),
        let_go=sorted({needs.run_id for needs in runs} - {needs.run_id for needs in kept}),
        unused=[Unused(kind=o.parent.parent.name, sha256=o.name, bytes=sizes[o]) for o in objects],
        entries=len(going) + len(broken),
        leftovers=[str(folder.relative_to(store.workspace)) for folder in folders],
        freed_bytes=sum(sizes.values()),
        held_back=silent,
    )
    return told, _Going([e.path for e in going] + broken, objects, folders)


def _entries(store: Store) -> tuple[list[_Entry], list[Path]]:
    """The store's index, and the entries that no stage could read."""
    found, broken = [], []
    for path in sorted((store.root / "index").glob("*/*.json")):
        manifest = store._read_index(path, forget=False)
        if manifest is None:
            broken.append(path)
            continue
        own = (path, path.parent.name, path.stem, manifest.sha256, manifest.parents)
        found.append(_Entry(*own, facts_of(manifest, ModelFacts).weights_sha256))
    return found, broken


def _closure(entries: list[_Entry], wanted: set[str]) -> set[str]:
    """These artifacts, and all that they were made from."""
    parents: dict[str, set[str]] = {}
    for entry in entries:
        parents.setdefault(entry.sha256, set()).update(entry.parents)
    found: set[str] = set()
    pending = list(wanted)
    while pending:
        digest = pending.pop()
        if digest not in found:
            found.add(digest)
            pending += parents.get(digest, ())
    return found


def _evaluated(workspace: Path) -> set[str]:
    """Digests of weights that `dpo evaluate` and `dpo compare` tell of."""
    found = set()
    for path in (workspace / "evaluations").glob("*/report.json"):
        with suppress(OSError, ValueError, KeyError, TypeError):
            found |= {model["sha256"] for model in json.loads(path.read_bytes())["models"]}
    return found


def _objects(store: Store) -> Iterator[Path]:
    """Every object; anything that is not named by a digest is not ours."""
    digits = set("0123456789abcdef")
    for path in sorted((store.root / "objects").glob("*/*/*")):
        if len(path.name) == 64 and set(path.name) <= digits:
            yield path


def _scratch(store: Store, keys: set[tuple[str, str]], finished: set[tuple[str, str]]) -> list[Path]:
    """Working folders of stages that are finished, or that no unfinished run will go on with."""
    in_work = {(stage, key[:16]) for stage, key in keys - finished}
    folders = sorted((store.workspace / "work").glob("*/*"))
    return [folder for folder in folders if (folder.parent.name, folder.name) not in in_work]


def _docs(store: Store, keys: set[tuple[str, str]], stay: list[_Entry]) -> list[Path]:
    """Data Docs, one folder a judgement, whose data go."""
    named = {key[:16] for _, key in keys} | {entry.key[:16] for entry in stay}
    folders = sorted((store.workspace / "data_docs").glob("*-*"))
    return [folder for folder in folders if folder.name.rpartition("-")[2] not in named]


def _hide(going: _Going, trash: Path) -> None:
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
            shutil.rmtree(path, ignore_errors=True)  # a working folder on a disk of its own
