"""The record of each run under the workspace: what was asked, where it stands, how to go on with it.

A run that was killed could not write its end: its record reads `running`, and its process is gone. Readers
see it as `stopped`, and the next run of the workspace, or the killed one's guard, writes that down; see
`close_abandoned`.
"""

import json
import re
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock
from pydantic import AwareDatetime, ValidationError

from dpo_core.config import Config
from dpo_core.errors import RecipeError
from tasks.owner import Owner
from tasks.tracking import Tracker
from tasks.workspace import disk_errors, open_workspace, run_folder, write_whole


class RunRecord(Config):
    """One alignment run."""

    run_id: str
    """Its name: recipe and start time."""
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
    error: str | None = None
    """Why it ended, when it did not end well."""
    owner: Owner | None = None
    """The process that does it, or did last."""

    @property
    def is_abandoned(self) -> bool:
        """Whether it never came to write its end."""
        return self.status == "running" and self.owner is not None and self.owner.is_gone()

    def as_stopped(self) -> "RunRecord":
        """The record that it would have left."""
        return self.model_copy(update={"status": "stopped", "error": _KILLED})


_KILLED = "its process was killed"


def new_run(workspace: str | Path, recipe_name: str, command: str) -> RunRecord:
    """A record with a fresh name."""
    started = datetime.now(UTC)
    stem = name = f"{recipe_name}-{started:%Y%m%d-%H%M%S}"
    count = 1
    while (Path(workspace) / "runs" / name).exists():
        count += 1
        name = f"{stem}-{count}"
    return RunRecord(run_id=name, recipe=recipe_name, started_at=started, command=command)


def save_run(workspace: str | Path, record: RunRecord) -> None:
    """Write the record, whole or not at all."""
    with disk_errors(Path(workspace), "writing the record of the run"):
        write_whole(run_folder(workspace, record.run_id) / "run.json", record.model_dump_json(indent=1))


def list_runs(workspace: str | Path) -> list[RunRecord]:
    """All records, newest first, killed runs as stopped; unreadable ones are left out."""
    return [record.as_stopped() if record.is_abandoned else record for record in _records(workspace)]


def close_abandoned(workspace: str | Path, tracker: Tracker) -> None:
    """Write down the end of runs that were killed, in MLflow and in their records.

    One that this MLflow does not know keeps its record: a run with the settings of its own will find it.

    Raises:
        StageFailed: MLflow does not answer.
    """
    for record in _records(workspace):
        if not record.is_abandoned:
            continue
        with FileLock(run_folder(workspace, record.run_id) / ".closing.lock"):
            # Looked at again: another may have closed it by now, and even have gone on with it.
            now = _read(run_folder(workspace, record.run_id) / "run.json")
            if now and now.is_abandoned and tracker.close_killed(now.mlflow_run_id, _KILLED):
                save_run(workspace, now.as_stopped())


def _records(workspace: str | Path) -> list[RunRecord]:
    found = [_read(path) for path in (open_workspace(workspace) / "runs").glob("*/run.json")]
    readable = [record for record in found if record is not None]
    return sorted(readable, key=lambda record: record.started_at, reverse=True)


def _read(path: Path) -> RunRecord | None:
    try:
        return RunRecord.model_validate(json.loads(path.read_text()))
    except (OSError, ValueError, ValidationError):
        return None


def find_run(workspace: str | Path, wanted: str, recipe_name: str) -> RunRecord:
    """The run to resume: by name, or the newest unfinished one of this recipe for `latest`.

    Raises:
        RecipeError: there is none.
    """
    runs = list_runs(workspace)
    if wanted == "latest":
        unfinished = [r for r in runs if r.recipe == recipe_name and r.status != "done"]
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
    raise RecipeError(f"the workspace {workspace} holds no run named {wanted}", f"Newest runs: {known}")
