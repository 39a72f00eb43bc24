"""The record of each run under the workspace: what was asked, where it stands, how to go on with it."""

import json
import re
from datetime import UTC, datetime
from pathlib import Path

from pydantic import AwareDatetime, Field, ValidationError

from dpo_core.config import Config
from dpo_core.errors import RecipeError
from tasks.workspace import disk_errors, open_workspace, run_folder, write_whole


class RunRecord(Config):
    """One alignment run."""

    run_id: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,250}$")
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
