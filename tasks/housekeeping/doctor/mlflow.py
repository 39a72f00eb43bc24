"""Checks of MLflow: the tracking database or server that the runs of a workspace write to."""

import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from tasks.housekeeping.doctor.check_result import CheckResult, failure, ok
from tasks.promotion.finished_run import database_gone
from tasks.recipe.sections import TrackingConfig
from tasks.tracking.connection import begin_writing, one_line, resolve_uri


def tracking(place: Path) -> Iterator[CheckResult]:
    """The tracking database or server is usable and matches the installed version of MLflow."""
    uri = resolve_uri(TrackingConfig(), place)
    shown = one_line(ValueError(uri))
    if database_gone(uri):
        yield ok("mlflow", f"{shown} will be created by the first run")
        return
    try:
        if uri.startswith("sqlite:///"):
            _write(Path(uri.removeprefix("sqlite:///")))
        MlflowClient(uri).search_experiments(max_results=1)
    except (MlflowException, sqlite3.Error, OSError) as error:
        yield failure("mlflow", f"{shown} cannot be used ({one_line(error)[:300]})", _remedy(uri, str(error)))
    else:
        yield ok("mlflow", f"{shown} can be used")


def _write(path: Path) -> None:
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=1)) as database:
        try:
            begin_writing(database)
            database.rollback()
        except sqlite3.OperationalError as error:
            if "locked" not in str(error):  # another process is writing
                raise


def _remedy(uri: str, problem: str) -> str:
    if "out-of-date database schema" in problem:
        return (
            f"If an older MLflow wrote it: back it up, then mlflow db upgrade {uri}. If a newer one did: "
            "pip install --upgrade mlflow, as in constraints.txt"
        )
    if not uri.startswith("http"):
        return "Make it writable. If it is damaged, move it away: runs create a new one and keep artifacts"
    if re.search(r"\b401\b", problem):
        return "export MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
    if re.search(r"\b403\b", problem):
        return f"Start it with --allowed-hosts {urlsplit(uri).netloc} (including the port)"
    return "Start an MLflow server there (dpo ui, or mlflow server), or unset MLFLOW_TRACKING_URI"
