"""Reports of a workspace's finished runs, and the MLflow registries that hold their models."""

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path

from dpo_core.errors import RecipeError
from dpo_core.redaction import HIDDEN
from tasks.recipe.sections import TrackingConfig
from tasks.reports.run_report import ModelRow, RunReport
from tasks.runs.record import list_runs
from tasks.tracking.connection import resolve_uri
from tasks.tracking.tracker import Tracker


def finished_report(workspace: Path, run_id: str) -> tuple[RunReport, ModelRow]:
    """The report of a finished alignment run, and the model that it registered.

    Raises:
        RecipeError: the run does not exist, is unfinished, is a study, registered no model, or its report
            is damaged.
    """
    report = read_report(workspace, run_id)
    if report.model is None or report.model.version is None:
        raise RecipeError(f"the run {run_id} registered no model", f"Run it again: {report.run.command}")
    return report, report.model


def read_report(workspace: Path, run_id: str) -> RunReport:
    """The report of a finished alignment run.

    Raises:
        RecipeError: the run does not exist, is unfinished, is a study, or its report is damaged.
    """
    runs = list_runs(workspace)
    record = next((run for run in runs if run.run_id == run_id), None)
    if record is None:
        names = [run.run_id for run in runs]
        near = get_close_matches(run_id, names, n=1, cutoff=0.8)
        raise RecipeError(
            f"the workspace {workspace} has no run named {run_id}",
            f"{f'Did you mean {near[0]}? ' if near else ''}Newest runs: {', '.join(names[:5]) or 'none'}",
        )
    again = f"Finish it first: {record.resume_line}"
    if record.status != "done":
        raise RecipeError(f"the run {run_id} is not finished: its status is {record.status}", again)
    path = _report_of(workspace, run_id)
    try:
        facts = json.loads(path.read_bytes())
        if isinstance(facts, dict) and "study" in facts:
            raise RecipeError(f"{run_id} is a study, which registers no model", "Name an alignment run.")
        return RunReport.model_validate(facts)
    except (OSError, ValueError) as error:
        problem = f"the report {path} is missing, damaged or written by another version of dpo"
        raise RecipeError(problem, again) from error


def newest_report(workspace: Path) -> RunReport | None:
    """The report of the newest finished alignment run; None where there is none."""
    for record in list_runs(workspace):
        with suppress(RecipeError):  # unfinished, damaged or a study: try the next newest
            return read_report(workspace, record.run_id)
    return None


def registry_of(workspace: Path, report: RunReport | None = None) -> Tracker:
    """The MLflow registry that the run wrote to; without a run, the newest finished run's.

    A tracking database inside the workspace is used at its present path, because workspaces may be moved.

    Raises:
        RecipeError: the workspace has no finished run, no tracking database, and no MLFLOW_TRACKING_URI.
    """
    own = workspace / "mlflow.db"
    report = report or newest_report(workspace)
    uri = _moved(report.run.tracking_uri if report else None, own)
    if not (uri or own.exists() or os.environ.get("MLFLOW_TRACKING_URI")):
        raise RecipeError(f"the workspace {workspace} has no finished run", "List its runs with: dpo runs")
    return Tracker(TrackingConfig(uri=uri), workspace)


def registries_of(workspace: Path, uris: Iterable[str | None]) -> list[Tracker]:
    """Every MLflow registry that may hold models of this workspace: those its runs wrote to, and its own.

    A database file that was removed is left out, because opening it would create it again.
    """
    own = workspace / "mlflow.db"
    named = {_moved(uri, own) for uri in uris} - {None}
    if own.exists() or os.environ.get("MLFLOW_TRACKING_URI"):
        named.add(resolve_uri(TrackingConfig(), workspace))
    there = sorted(uri for uri in named if uri and not database_gone(uri))
    return [Tracker(TrackingConfig(uri=uri), workspace) for uri in there]


def _moved(uri: str | None, own: Path) -> str | None:
    if uri and uri.startswith("sqlite:") and uri.endswith("/mlflow.db") and own.exists():
        return f"sqlite:///{own}"
    if uri and HIDDEN in uri:
        return None  # the password was redacted; MLFLOW_TRACKING_URI holds the full address
    return uri


def database_gone(uri: str) -> bool:
    """Whether a tracking URI names a SQLite file that does not exist. MLflow would create it."""
    return uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists()


def _report_of(workspace: Path, run_id: str) -> Path:
    return workspace / "runs" / run_id / "report.json"
