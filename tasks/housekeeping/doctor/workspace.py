"""Checks of a workspace: folder, owner, disk space, stuck runs, leftovers, clock, garbage and champions."""

import os
import shutil
import socket
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil

from dpo_core.errors import DpoError
from tasks.housekeeping.doctor.check_result import CheckResult, failure, ok, skipped, warning
from tasks.housekeeping.garbage_collection import free
from tasks.promotion.finished_run import registries_of
from tasks.promotion.ledger import ALIAS, Ledger, registered_models
from tasks.promotion.model_source import version_title, weights_of
from tasks.runs.record import RunRecord, list_runs, read_records
from tasks.runs.references import read_references
from tasks.store.files import require_writable, size_of
from tasks.store.manifest import Manifest
from tasks.store.store import Store
from tasks.tracking.registry import version_of

_LITTLE = 5 * 10**9  # a run of the demo stores 2 GB and needs as much again while it runs
_NOTHING = 10**9
_ENTRIES = 5000
_QUIET = timedelta(days=1)


def folder(place: Path) -> Iterator[CheckResult]:
    """The workspace is writable, and its folders are on one file system, so that renames work."""
    above = next(path for path in (place, *place.parents) if path.exists())
    if above != place:
        if above.is_dir() and os.access(above, os.W_OK):
            yield ok("workspace", f"{place} will be created by the first run")
        else:
            says = f"{place} cannot be created: {above} is not a writable folder"
            yield failure("workspace", says, "Choose another workspace: --workspace")
        return
    try:
        require_writable(place)
    except DpoError as error:
        yield failure("workspace", error.problem, error.remedy)
        return
    parts = [place / name for name in ("store", "store/objects", "store/tmp", "work", "runs")]
    apart = [part.name for part in parts if part.exists() and part.stat().st_dev != place.stat().st_dev]
    if apart:
        says = f"{', '.join(apart)} of {place} are on other disks: results are copied, not renamed"
        yield warning("workspace", says, "Put the workspace on a single file system")
    else:
        yield ok("workspace", f"{place} is writable")


def owner(place: Path) -> Iterator[CheckResult]:
    """No file belongs to another user, which happens after a run with sudo."""
    if not place.exists():
        return
    own, seen, others = place.stat().st_uid, 0, []
    for where, names, files in os.walk(place):
        for name in (*names, *files):
            path = Path(where, name)
            seen += 1
            try:
                if path.lstat().st_uid != own:
                    others.append(path)
            except OSError:
                continue
        if others or seen > _ENTRIES:
            break
    if others:
        says = f"{others[0]} belongs to another user than the workspace"
        yield failure("owner", says, f"sudo chown -R $(stat -c %u:%g {place}) {place}")
    else:
        yield ok("owner", "all files belong to the owner of the workspace")


def disk(place: Path) -> Iterator[CheckResult]:
    """The disk has space for another run like the newest."""
    existing = next(path for path in (place, *place.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    took = _newest_bytes(Store(place))
    needed = max(2 * took, _NOTHING) if took else _LITTLE
    says = f"{free / 1e9:.1f} GB free at {existing}"
    remedy = "Free some space: dpo gc --dry-run lists what it would remove"
    if free < _NOTHING:
        yield failure("disk", says, remedy)
    elif free < needed:
        like = f"a run like the newest takes up to {needed / 1e9:.1f} GB"
        yield warning("disk", f"{says}; {like}", remedy)
    else:
        yield ok("disk", says)


def _newest_bytes(store: Store) -> int:
    """Bytes of the artifacts that the newest finished run made or used."""
    finished = [run for run in read_references(store.workspace) if run.finished and run.record]
    if not finished:
        return 0
    newest = max(finished, key=lambda run: run.record.started_at if run.record else datetime.min)
    manifests: dict[str, Manifest] = {}
    for stage in {path.name for path in (store.root / "index").glob("*")}:
        manifests |= {manifest.sha256: manifest for manifest in store.history(stage)}
    return sum(
        file.bytes
        for digest in newest.digests
        if digest in manifests
        for file in manifests[digest].files.values()
    )


def stuck_runs(place: Path) -> Iterator[CheckResult]:
    """No run is recorded as running although its process is gone."""
    running = [record for record in read_records(place) if record.status == "running"]
    stuck = 0
    for record in running:
        if why := _stuck(place, record):
            stuck += 1
            resume = f"Resume it: {record.resume_line}"
            drop = f"or free its artifacts: dpo gc --drop-run {record.run_id}"
            yield failure("runs", f"{record.run_id} is recorded as running, but {why}", f"{resume}; {drop}")
    if not stuck:
        yield ok("runs", f"{len(running)} in progress, none stuck")


def _stuck(place: Path, record: RunRecord) -> str | None:
    if record.is_abandoned:
        return "its process is gone"
    if record.owner is not None:
        return None
    touched = max(path.stat().st_mtime for path in (place / "runs" / record.run_id).glob("*"))
    quiet = datetime.now(UTC) - datetime.fromtimestamp(touched, UTC)
    return f"nothing was written for {quiet.days} days" if quiet > _QUIET else None


def leftovers(place: Path) -> Iterator[CheckResult]:
    """No unfinished folders of killed processes remain; reports locks that name a dead holder."""
    store = Store(place)
    left = store.leftovers()
    stale = [path for path in (store.root / "locks").glob("*.holder") if _holder_gone(path)]
    if left:
        says = f"{len(left)} unfinished folders of killed processes in {store.root / 'tmp'}"
        yield warning("leftovers", says, "dpo gc removes them; so does the next run")
    elif stale:
        says = f"{stale[0].stem} names a holder that has ended; the lock itself is free"
        yield ok("leftovers", says)
    else:
        yield ok("leftovers", "none")


def _holder_gone(path: Path) -> bool:
    try:
        words = path.read_text().split()
        return words[3] == socket.gethostname() and not psutil.pid_exists(int(words[1]))
    except (OSError, ValueError, IndexError):
        return False


def clock(place: Path) -> Iterator[CheckResult]:
    """No run has a start time in the future."""
    newest = max((record.started_at for record in list_runs(place)), default=None)
    ahead = (newest - datetime.now(UTC)).total_seconds() if newest else 0.0
    if ahead > 60:
        says = f"the newest run started {ahead / 60:.0f} minutes in the future: a clock is or was wrong"
        yield warning(
            "clock", says, "Set the clock (timedatectl set-ntp true): runs are listed by start time"
        )
    else:
        yield ok("clock", time.strftime("%Y-%m-%d %H:%M:%S %z"))


def garbage(place: Path) -> Iterator[CheckResult]:
    """The size of the store, and how much of it garbage collection would free."""
    if not (place / "store").exists():
        yield skipped("store", "the store is empty")
        return
    could = free(place, dry_run=True)
    size = size_of(place / "store" / "objects") + size_of(place / "work")
    says = f"{size / 1e9:.2f} GB, of which dpo gc would free {could.freed_bytes / 1e9:.2f} GB"
    if could.freed_bytes > max(size / 2, _LITTLE):
        yield warning("store", says, "dpo gc --dry-run, then dpo gc")
    else:
        yield ok("store", says)


def champions(place: Path) -> Iterator[CheckResult]:
    """Aliases, ledger and weights of every registered model agree. The weights are not read."""
    check, count = "dpo promote --check", 0
    for tracker in registries_of(place, (run.tracking_uri for run in read_references(place))):
        for name in (model.name for model in registered_models(tracker)):
            ledger, champion = Ledger(tracker, name), version_of(tracker, name, ALIAS)
            entries = ledger.read()
            count += 1
            if entries and not entries[-1].state:
                change = entries[-1].change
                says = f"the {change.kind} of {name} version {change.version} was interrupted"
                yield failure("champion", says, check)
            elif (recorded := ledger.moved()) is not None:
                says = f"the alias {ALIAS} of {name} was moved by hand: the ledger has version {recorded}"
                yield warning("champion", says, f"{check}; then dpo promote or dpo rollback")
            elif champion is not None and weights_of(champion) is None:
                uri = champion.tags.get("dpo.weights_uri")
                says = f"the weights of {version_title(champion)} are not at {uri}"
                yield failure("champion", says, "dpo rollback, or train the model again")
            else:
                yield ok("champion", version_title(champion) if champion else f"{name} has no champion")
    if not count:
        yield skipped("champion", "no model is registered")
