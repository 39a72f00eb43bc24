"""The record of each run under the workspace: what was asked, where it stands, how to go on with it."""

import json
import os
import re
import socket
from datetime import UTC, datetime
from pathlib import Path

import psutil
from pydantic import AwareDatetime, ValidationError

from dpo_core.config import Config
from dpo_core.errors import RecipeError
from tasks.workspace import disk_errors, open_workspace, run_folder, write_whole

STATUSES = ("running", "done", "failed", "refused")


class RunRecord(Config):
    """One alignment run."""

    run_id: str
    """Its name: recipe and start time."""
    recipe: str
    """Name of the recipe."""
    status: str = "running"
    """running, done, failed or refused."""
    started_at: AwareDatetime
    """First start (UTC)."""
    mlflow_run_id: str | None = None
    """Parent run in MLflow."""
    command: str = ""
    """The command that started it."""
    error: str | None = None
    """Why it ended, when it did not end well."""
    process: str | None = None
    """The process at work on it, as `own_process` names it; older versions did not say."""
    lists_stages: bool = False
    """Whether `stages.jsonl` beside it lists what it needs from its start on; older versions did not."""


def new_run(workspace: str | Path, recipe_name: str, command: str) -> RunRecord:
    """A record with a fresh name."""
    started = datetime.now(UTC)
    stem = name = f"{recipe_name}-{started:%Y%m%d-%H%M%S}"
    count = 1
    while (Path(workspace) / "runs" / name).exists():
        count += 1
        name = f"{stem}-{count}"
    return RunRecord(run_id=name, recipe=recipe_name, started_at=started, command=command, lists_stages=True)


def own_process() -> str:
    """This process, told from a later one that gets its number: host, number and time of birth."""
    return f"{socket.gethostname()}+{os.getpid()}+{psutil.Process().create_time():.0f}"


def is_gone(record: RunRecord) -> bool:
    """Whether the process that a run is recorded to be at work in is no more; of another host: False."""
    if record.process is None:
        return False
    host, pid, born = record.process.rsplit("+", 2)
    if host != socket.gethostname():
        return False
    try:
        process = psutil.Process(int(pid))
        return abs(process.create_time() - int(born)) > 2 or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:
        return False


def save_run(workspace: str | Path, record: RunRecord) -> None:
    """Write the record, whole or not at all."""
    with disk_errors(Path(workspace), "writing the record of the run"):
        write_whole(run_folder(workspace, record.run_id) / "run.json", record.model_dump_json(indent=1))


def list_runs(workspace: str | Path) -> list[RunRecord]:
    """All records, newest first; unreadable ones are left out."""
    found = []
    for path in (open_workspace(workspace) / "runs").glob("*/run.json"):
        try:
            found.append(RunRecord.model_validate(json.loads(path.read_text())))
        except (OSError, ValueError, ValidationError):
            continue
    return sorted(found, key=lambda record: record.started_at, reverse=True)


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
