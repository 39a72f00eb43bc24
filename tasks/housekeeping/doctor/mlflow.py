"""Checks of MLflow: the tracking database or server that the runs of a workspace write to."""

import json
import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx

from tasks.housekeeping.doctor.check_result import CheckResult, failure, ok, skipped, warning
from tasks.housekeeping.doctor.http import SECONDS, ask, skew
from tasks.recipe.sections import TrackingConfig
from tasks.runs.record import list_runs
from tasks.tracking.connection import begin_writing, one_line, resolve_uri

_NEWEST = 10


def tracking(place: Path) -> Iterator[CheckResult]:
    """The tracking database or server is usable and matches the installed version of MLflow."""
    uri = resolve_uri(TrackingConfig(), place)
    if uri.startswith("sqlite:///"):
        yield from _database(Path(uri.removeprefix("sqlite:///")))
    elif uri.startswith("http"):
        yield from _server(uri.rstrip("/"))
    else:
        yield skipped("mlflow", f"{one_line(ValueError(uri))} is not checked")


def _database(path: Path) -> Iterator[CheckResult]:
    if not path.exists():
        yield ok("mlflow", f"{path} will be created by the first run")
        return
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=1)) as database:
            row = database.execute("select version_num from alembic_version").fetchone()
            begin_writing(database)
            database.rollback()
    except sqlite3.Error as error:
        if "locked" in str(error):
            yield ok("mlflow", f"{path} is being written by another process")
            return
        remedy = "Make it writable. If it is damaged, move it away: runs create a new one and keep artifacts"
        yield failure("mlflow", f"{path} cannot be used ({error})", remedy)
        return
    known = _revisions()
    if row and known and row[0] not in known:
        says = f"{path} was written by a newer MLflow than {version('mlflow')}"
        yield failure("mlflow", says, "pip install --upgrade mlflow, as in constraints.txt")
    elif row and known and row[0] in known.values():
        remedy = f"Back up the file, then: mlflow db upgrade sqlite:///{path}"
        yield failure("mlflow", f"{path} was written by an older MLflow than {version('mlflow')}", remedy)
    else:
        yield ok("mlflow", f"{path} is writable and has this version's schema")


def _revisions() -> dict[str, str | None]:
    """Each schema revision of the installed MLflow and its predecessor, read without importing MLflow."""
    spec = find_spec("mlflow")
    places = (spec and spec.submodule_search_locations) or ()
    folders = [Path(place) / "store/db_migrations/versions" for place in places]
    known: dict[str, str | None] = {}
    for path in (path for folder in folders for path in folder.glob("*.py")):
        text = path.read_text()
        own, before = (
            re.search(rf"""^{name}(?::[^=]*)? = ["'](\w+)["']""", text, re.MULTILINE)
            for name in ("revision", "down_revision")
        )
        if own:
            known[own[1]] = before[1] if before else None
    return known


def _server(uri: str) -> Iterator[CheckResult]:
    login = (os.environ.get("MLFLOW_TRACKING_USERNAME"), os.environ.get("MLFLOW_TRACKING_PASSWORD"))
    auth = (login[0], login[1]) if login[0] and login[1] else None
    place = one_line(ValueError(uri))
    query = f"{uri}/api/2.0/mlflow/experiments/search"
    answer = ask("GET", query, params={"max_results": 1}, auth=auth)
    if isinstance(answer, str):
        remedy = "Start it (dpo ui, or mlflow server), or unset MLFLOW_TRACKING_URI"
        yield failure("mlflow", f"{place} does not answer within {SECONDS:.0f} s ({answer})", remedy)
        return
    if answer.status_code == 401:
        remedy = "export MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        yield failure("mlflow", f"{place} requires a valid user name and password", remedy)
    elif answer.status_code == 403:
        host = httpx.URL(uri).netloc.decode()
        remedy = f"Start it with --allowed-hosts {host} (including the port)"
        yield failure("mlflow", f"{place} refuses this host name ({answer.text[:80]})", remedy)
    elif answer.status_code != 200:
        says = f"{place} answers {answer.status_code}: {answer.text[:120]}"
        yield failure("mlflow", says, "Check that this is the address of an MLflow server")
    else:
        reply = ask("GET", f"{uri}/version", auth=auth)
        remote = reply.text.strip() if not isinstance(reply, str) and reply.status_code == 200 else "unknown"
        yield from _same_version(place, remote)
    yield from skew("mlflow", answer)


def _same_version(place: str, remote: str) -> Iterator[CheckResult]:
    local = version("mlflow")
    if remote.split(".")[:1] == local.split(".")[:1]:
        yield ok("mlflow", f"{place} answers, version {remote}")
    else:
        remedy = "Install the same version on both"
        yield warning("mlflow", f"{place} has version {remote}, this machine has {local}", remedy)


def undelivered(place: Path) -> Iterator[CheckResult]:
    """The newest finished runs have also ended in MLflow; a resume sends writes that MLflow missed."""
    done = [r for r in list_runs(place) if r.status == "done" and r.mlflow_run_id][:_NEWEST]
    uri = resolve_uri(TrackingConfig(), place)
    if not done:
        return
    if uri.startswith("sqlite:///"):
        states: dict[str, str | None] = _states_in(Path(uri.removeprefix("sqlite:///")))
    else:
        states = {str(r.mlflow_run_id): _state_on(uri.rstrip("/"), str(r.mlflow_run_id)) for r in done}
    late = [r for r in done if states.get(str(r.mlflow_run_id)) == "RUNNING"]
    for record in late:
        yield warning("mlflow", f"{record.run_id} is done, but still running in MLflow", record.resume_line)
    if not late:
        yield ok("mlflow", f"the newest {len(done)} finished runs have ended in MLflow too")


def _states_in(path: Path) -> dict[str, str | None]:
    if not path.exists():
        return {}
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=1)) as database:
        return dict(database.execute("select run_uuid, status from runs where status = 'RUNNING'"))


def _state_on(uri: str, run_id: str) -> str | None:
    answer = ask("GET", f"{uri}/api/2.0/mlflow/runs/get", params={"run_id": run_id})
    if isinstance(answer, str) or answer.status_code != 200:
        return None
    facts: Any = json.loads(answer.text)
    return str(facts["run"]["info"]["status"])
