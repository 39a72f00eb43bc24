"""Starts and ends every run: pre-flight checks, its record, and its MLflow run."""

import contextlib
import logging
from collections.abc import Callable
from typing import TypeVar
from uuid import UUID

from prefect import get_client
from prefect.runtime import flow_run

from deploy.launchers import Cluster
from dpo_core.errors import DpoError, GateRefused, without_secrets
from dpo_core.redaction import redact
from dpo_core.temporary import this_process
from flows.process.environment import hide_secrets_in_logs
from tasks.preflight import check_before_run
from tasks.promotion.model_source import pinned_name
from tasks.provenance import command_line
from tasks.recipe.recipe import Recipe
from tasks.runs.recipe import model_names, store_recipe, with_models
from tasks.runs.record import KILLED, RunRecord, close_abandoned, find_run, new_run, run_lock, save_run
from tasks.signals import stop_of_process
from tasks.stages.base import Context
from tasks.store.files import open_workspace
from tasks.store.store import Store
from tasks.tracking.tracker import Tracker

log = logging.getLogger("dpo")
Report = TypeVar("Report")


def run_with_record(
    recipe: Recipe,
    resume: str | None,
    run_stages: Callable[[Context, Recipe, str], Report],
    command: str | None = None,
    cluster: Cluster | None = None,
) -> Report:
    """Run the stages with a record of the run from its start to its end; returns their report.

    Args:
        run_stages: gets the context, the recipe and the command that started the run.
        command: that command, if it is not the command line of this process.
        cluster: where jobs run; None: on this machine.
    """
    hide_secrets_in_logs()
    check_before_run(recipe, resume, cluster)
    workspace = open_workspace(recipe.workspace)
    command = command or command_line()
    tracker = Tracker(recipe.tracking, workspace)
    if resume:
        record = find_run(workspace, resume, recipe.name)
    else:
        models = _moving_names(recipe, tracker)
        record = new_run(workspace, recipe.name, command).model_copy(update={"models": models})
    recipe = with_models(recipe, record.models)
    with run_lock(workspace, record.run_id), without_secrets():
        if record.recipe_sha256 is None:
            record = store_recipe(workspace, record, recipe)
        ranks = recipe.inference.on_node(cluster.settings.gpus if cluster else 0)
        context = Context(record.run_id, Store(workspace), tracker, stop_of_process(), cluster, ranks)
        context.prefect_artifacts.send(lambda: _name_flow_run(record.run_id))
        return _run_locked(context, recipe, record, run_stages, command, resumed=bool(resume))


def _name_flow_run(name: str) -> None:
    """Give the run in Prefect the name that it has in MLflow and in the workspace."""
    if flow_run.id:
        with get_client(sync_client=True) as client:
            client.update_flow_run(UUID(flow_run.id), name=name)


def _moving_names(recipe: Recipe, tracker: Tracker) -> dict[str, str]:
    """The current models behind aliases and `latest`, whose meaning may change."""
    pinned = {name: pinned_name(name, tracker.workspace, tracker) for name in model_names(recipe)}
    return {name: fixed for name, fixed in pinned.items() if fixed != name}


def _run_locked(
    context: Context,
    recipe: Recipe,
    record: RunRecord,
    run_stages: Callable[[Context, Recipe, str], Report],
    command: str,
    resumed: bool,
) -> Report:
    if resumed and (record.status == "running" or record.error == KILLED):  # and no process holds its lock
        log.warning(
            "resuming run %s, which was killed or whose machine went down (if memory ran out, start a new "
            "run with smaller batches in the stage that was running)",
            record.run_id,
        )
    workspace, tracker = context.workspace, context.tracker
    close_abandoned(workspace, tracker)
    # Recorded before the MLflow run starts, so that a run killed in between can be resumed.
    record = record.model_copy(update={"status": "running", "error": None, "owner": this_process()})
    save_run(workspace, record)

    def opened(mlflow_id: str) -> None:
        nonlocal record
        record = record.model_copy(update={"mlflow_run_id": mlflow_id})
        save_run(workspace, record)

    try:
        tracker.start_parent(
            record.run_id,
            recipe=recipe.model_dump(mode="json"),
            run_id=record.mlflow_run_id,
            reopen=resumed,
            description=recipe.description,
            tags={"dpo.run": record.run_id, "dpo.command": command},
            opened=opened,
        )
        context.store.sweep()
        report = run_stages(context, recipe, command)
    except BaseException as error:
        context.stop.begin(error)
        _record_failure(context, record, error)
        raise
    finally:
        context.server.close()
    tracker.finish_parent("FINISHED")
    save_run(workspace, record.model_copy(update={"status": "done"}))
    return report


def reason_of(error: BaseException) -> str:
    """The reason for the end of a run, also for errors without a message such as Prefect's cancellation."""
    if isinstance(error, DpoError):
        return str(error)
    name = type(error).__name__
    if str(error).strip():
        return f"{name}: {error}"
    if name == "CancelledError":
        return "Prefect ended the run (CancelledError); see the run's log in Prefect, and the server's log"
    return f"the run ended with {name}, without a message; the traceback is in the log"


def _record_failure(context: Context, record: RunRecord, error: BaseException) -> None:
    tracker, stopped = context.tracker, context.stop.reason
    status = "refused" if isinstance(error, GateRefused) else "failed"
    reason = redact(reason_of(error))
    if stopped:
        status, reason = "stopped", stopped
    with contextlib.suppress(DpoError):  # a full disk must not hide the reason
        save_run(context.workspace, record.model_copy(update={"status": status, "error": reason}))
    if not tracker.run_id:  # MLflow has no run yet
        return
    tracker.parent.tag("dpo.error", reason)
    tracker.finish_parent("KILLED" if stopped or not isinstance(error, Exception) else "FAILED")
