"""The record of each run (`run.json`): recipe, status, owner process and the command that resumes it.

A killed run cannot record its end: its record says `running` although its process is gone. Such records are
read as `stopped`. The next run of the workspace writes that status to disk; see `close_abandoned`.
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

from filelock import FileLock
from pydantic import AwareDatetime, ConfigDict, Field, ValidationError

from dpo_core.config import Config
from dpo_core.errors import RecipeError
from dpo_core.system import write_atomic
from dpo_core.temporary import Owner, this_process
from tasks.store.files import disk_errors, open_workspace, run_folder
from tasks.store.locks import holder_of, is_held, locked

if TYPE_CHECKING:
    from tasks.tracking.tracker import Tracker  # listing runs must not import it

log = logging.getLogger(__name__)

STATUSES = ("running", "done", "failed", "refused", "stopped")


@dataclass(frozen=True)
class StartTime:
    """The start of some work, with a clock for its duration."""

    at: datetime = field(default_factory=lambda: datetime.now(UTC))
    _ticks: float = field(default_factory=time.monotonic)

    def seconds(self) -> float:
        """Seconds since the start, by the monotonic clock."""
        return time.monotonic() - self._ticks


class RunRecord(Config):
    """One alignment run."""

    # Records of earlier versions have further fields.
    model_config = ConfigDict(extra="ignore")

    run_id: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,250}$")
    """The run's name: recipe and start time."""
    number: int = 0
    """Sequence number among the workspace's runs. Unlike times, it is not affected by clock changes."""
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
    """Digest of the stored resolved recipe, which a resume must match; None for runs of older versions."""
    models: dict[str, str] = Field(default_factory=dict)
    """The permanent name of each movable model name at the run's start: `models:/dpo-demo@champion` to
    `models:/dpo-demo/3`. A resume uses the permanent names."""
    error: str | None = None
    """The error that ended the run, if it failed."""
    owner: Owner | None = None
    """The process that runs it, or ran it last; None for runs of older versions."""

    @property
    def is_abandoned(self) -> bool:
        """True if the owning process is gone but the record still says `running`."""
        return self.status == "running" and self.owner is not None and self.owner.is_gone()

    @property
    def resume_line(self) -> str:
        """The command that resumes the run."""
        return resume_line(self.command or shlex.join(["dpo", "run", self.recipe]), self.run_id)

    def as_stopped(self) -> "RunRecord":
        """The record with status `stopped` and the reason."""
        return self.model_copy(update={"status": "stopped", "error": KILLED})


def resume_line(command: str, *run_id: str) -> str:
    """The command that resumes what a command began: the run of that name, by default the latest."""
    words = shlex.split(command)
    for place in [i for i, word in enumerate(words) if word == "--resume"]:  # and the run that it names
        if not "".join(words[place + 1 : place + 2]).startswith("-"):
            words[place + 1 : place + 2] = []
    kept = [word for word in words if word not in ("--json", "--resume")]
    return shlex.join([*kept, "--resume", *run_id])


KILLED = "its process was killed"


def new_run(workspace: str | Path, recipe_name: str, command: str) -> RunRecord:
    """A new record with a unique name and its own folder, even if two runs start at the same time."""
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
    )


def _made(folder: Path) -> bool:
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    return True


@contextmanager
def run_lock(workspace: str | Path, run_id: str) -> Iterator[None]:
    """Hold the run's lock. It is released if the process dies.

    Raises:
        RecipeError: another process holds the lock.
    """

    def busy(who: str) -> NoReturn:
        raise _busy(run_id, who)

    # Wait a second: another process may hold it only to test whether the run is active.
    with locked(_lock_path(workspace, run_id), "locking the run", busy, patience=1):
        yield


def is_locked(workspace: str | Path, run_id: str) -> bool:
    """Whether a living process holds the run's lock."""
    return is_held(_lock_path(workspace, run_id))


def _lock_path(workspace: str | Path, run_id: str) -> Path:
    return open_workspace(workspace) / "store" / "locks" / f"run-{run_id}.lock"


def _busy(run_id: str, who: str) -> RecipeError:
    return RecipeError(
        f"run {run_id} is in progress: {who}",
        "Wait until it ends, or start another run without --resume: finished stages are shared",
    )


def save_run(workspace: str | Path, record: RunRecord) -> None:
    """Write the record atomically."""
    with disk_errors(Path(workspace), "writing the record of the run"):
        write_atomic(run_folder(workspace, record.run_id) / "run.json", record.model_dump_json(indent=1))


def list_runs(workspace: str | Path) -> list[RunRecord]:
    """All records, newest first, killed runs as stopped. Unreadable records are left out."""
    return [record.as_stopped() if record.is_abandoned else record for record in read_records(workspace)]


def own_run(workspace: str | Path) -> RunRecord | None:
    """The newest run that this process started or resumed."""
    me = this_process()
    return next((record for record in read_records(workspace) if record.owner == me), None)


def close_abandoned(workspace: str | Path, tracker: "Tracker") -> None:
    """Set killed runs to stopped in their records, and to KILLED in MLflow.

    The record of a run that this MLflow does not have is left unchanged, for a run that uses its MLflow.

    Raises:
        StageFailed: MLflow does not answer.
    """
    for record in read_records(workspace):
        if not record.is_abandoned:
            continue
        with FileLock(_lock_path(workspace, f"{record.run_id}-end")):
            # Read again under the lock: another process may have closed or resumed the run meanwhile.
            now = _read(run_folder(workspace, record.run_id) / "run.json")
            if now and now.is_abandoned and tracker.close_killed(now.mlflow_run_id, KILLED):
                save_run(workspace, now.as_stopped())


def read_records(workspace: str | Path) -> list[RunRecord]:
    """All records as stored, newest first. Damaged records are logged and left out."""
    records = [_read(path) for path in (open_workspace(workspace) / "runs").glob("*/run.json")]
    readable = [record for record in records if record is not None]
    return sorted(readable, key=lambda record: (record.number, record.started_at), reverse=True)


def read_run(workspace: str | Path, run_id: str) -> RunRecord | None:
    """A run's record as stored; None if it is missing or damaged."""
    return _read(run_folder(workspace, run_id) / "run.json")


def _read(path: Path) -> RunRecord | None:
    try:
        return RunRecord.model_validate(json.loads(path.read_text()))
    except (OSError, ValueError, ValidationError):
        log.warning(
            "the record %s is damaged and was ignored; run its recipe without --resume: finished stages are "
            "reused",
            path,
        )
        return None


def find_run(workspace: str | Path, wanted: str, recipe_name: str) -> RunRecord:
    """The run to resume: by name, or with `latest` the newest unfinished run of this recipe.

    Runs that are in progress are not unfinished.

    Raises:
        RecipeError: no such run exists.
    """
    runs = list_runs(workspace)
    if wanted == "latest":
        begun = [r for r in runs if r.recipe == recipe_name and r.status != "done"]
        unfinished = [r for r in begun if not is_locked(workspace, r.run_id)]
        if begun and not unfinished:
            raise _busy(begun[0].run_id, holder_of(_lock_path(workspace, begun[0].run_id)))
        if not unfinished:
            raise RecipeError(
                f"the workspace {workspace} has no unfinished run of {recipe_name}",
                "Start a run without --resume; finished stages are not run again",
            )
        return unfinished[0]
    for record in runs:
        if record.run_id == wanted:
            if record.recipe != recipe_name:
                raise RecipeError(
                    f"run {wanted} is of the recipe {record.recipe}, not {recipe_name}",
                    f"Name the file of the recipe {record.recipe}, or another run",
                )
            return record
    names = ", ".join(r.run_id for r in runs[:5]) or "none"
    known = re.sub(r"\s+", " ", names)
    raise RecipeError(f"the workspace {workspace} has no run named {wanted}", f"Newest runs: {known}")
