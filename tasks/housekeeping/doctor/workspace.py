"""Checks of a workspace: folder, owner, disk space, stuck runs and champions."""

import os
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from tasks.housekeeping.doctor.check_result import CheckResult, failure, ok, skipped, warning
from tasks.promotion.finished_run import registries_of
from tasks.promotion.ledger import ALIAS, Ledger, registered_models
from tasks.promotion.model_source import version_title, weights_of
from tasks.runs.record import read_records
from tasks.runs.references import read_references
from tasks.store.files import require_writable
from tasks.tracking.registry import version_of

_LITTLE = 5 * 10**9  # a run of the demo stores 2 GB and needs as much again while it runs
_NOTHING = 10**9
_ENTRIES = 5000


def folder(place: Path) -> Iterator[CheckResult]:
    """The workspace is writable."""
    above = _existing(place)
    if above == place:
        require_writable(place)
        yield ok("workspace", f"{place} is writable")
    elif above.is_dir() and os.access(above, os.W_OK):
        yield ok("workspace", f"{place} will be created by the first run")
    else:
        says = f"{place} cannot be created: {above} is not a writable folder"
        yield failure("workspace", says, "Choose another workspace: --workspace")


def _existing(place: Path) -> Path:
    return next(path for path in (place, *place.parents) if path.exists())


def owner(place: Path) -> Iterator[CheckResult]:
    """No file belongs to another user, which happens after a run with sudo."""
    if not place.exists():
        return
    own = place.stat().st_uid
    other = next((p for p in islice(place.rglob("*"), _ENTRIES) if p.lstat().st_uid != own), None)
    if other:
        says = f"{other} belongs to another user than the workspace"
        yield failure("owner", says, f"sudo chown -R $(stat -c %u:%g {place}) {place}")
    else:
        yield ok("owner", "all files belong to the owner of the workspace")


def disk(place: Path) -> Iterator[CheckResult]:
    """The disk has space for another run."""
    existing = _existing(place)
    left = shutil.disk_usage(existing).free
    says = f"{left / 1e9:.1f} GB free at {existing}"
    remedy = "Free some space: dpo gc --dry-run lists what it would remove"
    if left < _NOTHING:
        yield failure("disk", says, remedy)
    elif left < _LITTLE:
        yield warning("disk", f"{says}; a run of the demo takes up to {_LITTLE / 1e9:.0f} GB", remedy)
    else:
        yield ok("disk", says)


def stuck_runs(place: Path) -> Iterator[CheckResult]:
    """No run is recorded as running although its process is gone."""
    running = [record for record in read_records(place) if record.status == "running"]
    stuck = [record for record in running if record.is_abandoned]
    for record in stuck:
        remedy = f"Resume it: {record.resume_line}; or free its artifacts: dpo gc --drop-run {record.run_id}"
        yield failure("runs", f"{record.run_id} is recorded as running, but its process is gone", remedy)
    if not stuck:
        yield ok("runs", f"{len(running)} in progress, none stuck")


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
