"""The record of each run under the workspace: what was asked, where it stands, how to go on with it.

A run that was killed could not write its end: its record reads `running`, and its process is gone. Readers
see it as `stopped`, and the next run of the workspace, or the killed one's guard, writes that down; see
`close_abandoned`.
"""

import json
import logging
import re
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from filelock import FileLock, Timeout
from pydantic import AwareDatetime, Field, ValidationError

from dpo_core.config import Config
from dpo_core.errors import RecipeError
from dpo_core.system import write_atomic
from tasks.store.files import disk_errors, open_workspace, run_folder
from tasks.store.locks import holder_of, locked
from tasks.store.owner import Owner, myself

if TYPE_CHECKING:
    from tasks.tracking.tracker import Tracker  # else a list of runs would load it

log = logging.getLogger(__name__)

STATUSES = ("running", "done", "failed", "refused", "stopped")


@dataclass(frozen=True)
class Started:
    """When work began."""

    at: datetime = field(default_factory=lambda: datetime.now(UTC))
    _ticks: float = field(default_factory=time.monotonic)

    def seconds(self) -> float:
        """Since then, on a clock that nobody sets."""
        return time.monotonic() - self._ticks


class RunRecord(Config):
    """One alignment run."""

    run_id: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,250}$")
    """Its name: recipe and start time."""
    number: int = 0
    """Its place among the workspace's runs. Clocks are set back; this is not."""
    recipe: str
    """Name of the recipe."""
    status: str = "running"
    """running, done, failed, refused (by the gate) or stopped (by a signal or a kill)."""
    started_at: AwareDatetime
    """First start (UTC)."""
    mlflow_run_id: str | None = None
    """Parent run in MLflow."""
    command: str = ""
    """The command that started it."""
    recipe_sha256: str | None = None
    """Digest of the resolved recipe beside it, from which a resume may not differ; older runs have none."""
    models: dict[str, str] = Field(default_factory=dict)
    """What the recipe's names that may move named when the run began: `models:/dpo-demo@champion` and
    `models:/dpo-demo/3`. A resume goes on with that."""
    error: str | None = None
    """Why it ended, when it did not end well."""
    owner: Owner | None = None
    """The process that does it, or did last; older versions did not say."""
    lists_stages: bool = False
    """Whether `stages.jsonl` beside it lists what it needs from its start on; older versions did not."""

    @property
    def is_abandoned(self) -> bool:
        """Whether its process ended and never came to write the run's end."""
        return self.status == "running" and self.owner is not None and self.owner.is_gone()

    @property
    def resume_line(self) -> str:
        """The command that goes on with it."""
        words = shlex.split(self.command) or ["dpo", "run", self.recipe]
        for place in [i for i, word in enumerate(words) if word == "--resume"]:  # and the run that it names
            if not "".join(words[place + 1 : place + 2]).startswith("-"):
                words[place + 1 : place + 2] = []
        kept = [word for word in words if word not in ("--json", "--resume")]
        return shlex.join([*kept, "--resume", self.run_id])

    def as_stopped(self) -> "RunRecord":
        """The record that it would have left."""
        return self.model_copy(update={"status": "stopped", "error": KILLED})


KILLED = "its process was killed"


def new_run(workspace: str | Path, recipe_name: str, command: str) -> RunRecord:
    """A record with a name and a folder that no other run has, also where two start at once."""
    started = datetime.now(UTC)
    stem = name = f"{recipe_name}-{started:%Y%m%d-%H%M%S}"
    count = 1
    with disk_errors(Path(workspace), "making the folder of the run"):
        folder = Path(workspace) / "runs"
        folder.mkdir(parents=True, exist_ok=True)
        while not _made(folder / name):
            count += 1
            name = f"{stem}-{count}"
    number = 1 + max((record.number for record in list_runs(workspace)), default=0)
    return RunRecord(
        run_id=name,
        number=number,
        recipe=recipe_name,
        started_at=started,
        command=command,
        lists_stages=True,
    )


def _made(folder: Path) -> bool:
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    return True


@contextmanager
def held(workspace: str | Path, run_id: str) -> Iterator[None]:
    """Keep every other process from going on with this run. A killed one lets go by itself.

    Raises:
        RecipeError: another process is at work on it.
    """

    def busy(who: str) -> NoReturn:
        raise _busy(run_id, who)

    # For a second: another may only be asking.
    with locked(_lock_path(workspace, run_id), "locking the run", busy, patience=1):
        yield


def is_held(workspace: str | Path, run_id: str) -> bool:
    """Whether a living process is at work on the run."""
    lock = FileLock(_lock_path(workspace, run_id))
    if not Path(lock.lock_file).exists():
        return False
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    except OSError:  # where nothing can be written, nobody is at work
        return False
    lock.release()
    return False


def _lock_path(workspace: str | Path, run_id: str) -> Path:
    return open_workspace(workspace) / "store" / "locks" / f"run-{run_id}.lock"


def _busy(run_id: str, who: str) -> RecipeError:
    return RecipeError(
        f"run {run_id} is being done by {who}",
        "Wait for its end, or start one of your own without --resume: finished stages are shared",
    )


def save_run(workspace: str | Path, record: RunRecord) -> None:
    """Write the record, whole or not at all."""
    with disk_errors(Path(workspace), "writing the record of the run"):
        write_atomic(run_folder(workspace, record.run_id) / "run.json", record.model_dump_json(indent=1))


def list_runs(workspace: str | Path) -> list[RunRecord]:
    """All records, newest first, killed runs as stopped; unreadable ones are left out."""
    return [record.as_stopped() if record.is_abandoned else record for record in read_records(workspace)]


def own_run(workspace: str | Path) -> RunRecord | None:
    """The newest run that this process has begun or gone on with."""
    me = myself()
    return next((record for record in read_records(workspace) if record.owner == me), None)


def close_abandoned(workspace: str | Path, tracker: "Tracker") -> None:
    """Write down the end of runs that were killed, in MLflow and in their records.

    One that this MLflow does not know keeps its record: a run with the settings of its own will find it.

    Raises:
        StageFailed: MLflow does not answer.
    """
    for record in read_records(workspace):
        if not record.is_abandoned:
            continue
        with FileLock(_lock_path(workspace, f"{record.run_id}-end")):
            # Looked at again: another may have closed it by now, and even have gone on with it.
            now = _read(run_folder(workspace, record.run_id) / "run.json")
            if now and now.is_abandoned and tracker.close_killed(now.mlflow_run_id, KILLED):
                save_run(workspace, now.as_stopped())


def read_records(workspace: str | Path) -> list[RunRecord]:
    """All records as they were written, newest first; damaged ones are left out, with a line in the log."""
    found = [_read(path) for path in (open_workspace(workspace) / "runs").glob("*/run.json")]
    readable = [record for record in found if record is not None]
    return sorted(readable, key=lambda record: (record.number, record.started_at), reverse=True)


def read_run(workspace: str | Path, run_id: str) -> RunRecord | None:
    """The record of a run as it was written; None where it is missing or damaged."""
    return _read(run_folder(workspace, run_id) / "run.json")


def _read(path: Path) -> RunRecord | None:
    try:
        return RunRecord.model_validate(json.loads(path.read_text()))
    except (OSError, ValueError, ValidationError):
        log.warning(
            "the record %s is damaged and left out; run its recipe without --resume: finished stages are "
            "not run again",
            path,
        )
        return None


def find_run(workspace: str | Path, wanted: str, recipe_name: str) -> RunRecord:
    """The run to resume: by name, or the newest unfinished one of this recipe for `latest`.

    One that a living process is at work on is not unfinished.

    Raises:
        RecipeError: there is none.
    """
    runs = list_runs(workspace)
    if wanted == "latest":
        begun = [r for r in runs if r.recipe == recipe_name and r.status != "done"]
        unfinished = [r for r in begun if not is_held(workspace, r.run_id)]
        if begun and not unfinished:
            raise _busy(begun[0].run_id, holder_of(_lock_path(workspace, begun[0].run_id)))
        if not unfinished:
            raise RecipeError(
                f"the workspace {workspace} holds no unfinished run of {recipe_name}",
                "Start one without --resume; finished stages are not run again anyway",
            )
        return unfinished[0]
    for record in runs:
        if record.run_id == wanted:
            if record.recipe != recipe_name:
                raise RecipeError(f"run {wanted} is of recipe {record.recipe}", "Name that recipe")
            return record
    names = ", ".join(r.run_id for r in runs[:5]) or "none"
    known = re.sub(r"\s+", " ", names)
    raise RecipeError(f"the workspace {workspace} has no run named {wanted}", f"Newest runs: {known}")
