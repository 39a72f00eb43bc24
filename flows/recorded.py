"""The frame of every run: checks ahead, its record, its MLflow run, and how both end."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from dpo_core.errors import DpoError, GateRefused
from tasks.ahead import check_ahead
from tasks.owner import myself
from tasks.provenance import command_line
from tasks.recipe import Recipe
from tasks.runs import RunRecord, close_abandoned, find_run, new_run, save_run
from tasks.stage import Context, remember_tracker
from tasks.stopping import begin_stop, stop_reason
from tasks.store import Store
from tasks.tracking import Tracker
from tasks.workspace import open_workspace

Report = TypeVar("Report")


def recorded(
    recipe: Recipe,
    resume: str | None,
    run_stages: Callable[[Context, Recipe, str], Report],
    command: str | None = None,
) -> Report:
    """What `run_stages` reports, with the run on record from its start to its end.

    Args:
        run_stages: given the context, the recipe and the command that started the run.
        command: what to put down as that command, where this process was not started by it.
    """
    check_ahead(recipe, resume)
    workspace = open_workspace(recipe.workspace)
    command = command or command_line()
    record = find_run(workspace, resume, recipe.name) if resume else new_run(workspace, recipe.name, command)
    tracker = Tracker(recipe.tracking, workspace)
    close_abandoned(workspace, tracker)
    record = record.model_copy(update={"status": "running", "error": None, "owner": myself()})

    def opened(mlflow_id: str) -> None:
        nonlocal record
        record = record.model_copy(update={"mlflow_run_id": mlflow_id})
        save_run(workspace, record)

    try:
        mlflow_id = tracker.start_parent(
            record.run_id,
            recipe=recipe.model_dump(mode="json"),
            run_id=record.mlflow_run_id,
            description=recipe.description,
            tags={"dpo.run": record.run_id, "dpo.command": command},
            opened=opened,
        )
        context = Context(workspace=str(workspace), run_id=record.run_id, mlflow_run_id=mlflow_id)
        remember_tracker(context, tracker)
        Store(workspace).sweep()
        report = run_stages(context, recipe, command)
    except BaseException as error:
        begin_stop(error)
        if tracker.run_id:  # else it never began
            _ended_badly(workspace, record, tracker, error)
        raise
    tracker.finish_parent("FINISHED")
    save_run(workspace, record.model_copy(update={"status": "done"}))
    return report


def _ended_badly(workspace: Path, record: RunRecord, tracker: Tracker, error: BaseException) -> None:
    status = "refused" if isinstance(error, GateRefused) else "failed"
    reason = str(error) if isinstance(error, DpoError) else f"{type(error).__name__}: {error}"
    if stopped := stop_reason():
        status, reason = "stopped", stopped
    with contextlib.suppress(DpoError):  # a full disk must not hide why the run ended
        save_run(workspace, record.model_copy(update={"status": status, "error": reason}))
    tracker.parent.tag("dpo.error", reason)
    tracker.finish_parent("KILLED" if stopped or not isinstance(error, Exception) else "FAILED")
