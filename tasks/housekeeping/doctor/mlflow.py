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

from tasks.housekeeping.doctor.finding import Finding, failure, ok, skipped, warning
from tasks.housekeeping.doctor.http import SECONDS, ask, skew
from tasks.recipe.sections import TrackingConfig
from tasks.runs.record import list_runs
from tasks.tracking.database import begin_writing
from tasks.tracking.outbox import one_line
from tasks.tracking.tracker import resolve_uri

_NEWEST = 10


def tracking(place: Path) -> Iterator[Finding]:
    """The database or server can be used, and is of the version that is installed."""
    uri = resolve_uri(TrackingConfig(), place)
    if uri.startswith("sqlite:///"):
        yield from _database(Path(uri.removeprefix("sqlite:///")))
    elif uri.startswith("http"):
        yield from _server(uri.rstrip("/"))
    else:
        yield skipped("mlflow", f"{one_line(ValueError(uri))} is not looked at")


def _database(path: Path) -> Iterator[Finding]:
    if not path.exists():
        yield ok("mlflow", f"{path} is made by the first run")
        return
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=1)) as database:
            found = database.execute("select version_num from alembic_version").fetchone()
            begin_writing(database)
            database.rollback()
    except sqlite3.Error as error:
        if "locked" in str(error):
            yield ok("mlflow", f"{path} is being written")
            return
        remedy = "Make it writable; if it is damaged, set it aside: runs begin a new one, and artifacts stay"
        yield failure("mlflow", f"{path} cannot be used ({error})", remedy)
        return
    known = _revisions()
    if found and known and found[0] not in known:
        says = f"{path} was written by a newer MLflow than {version('mlflow')}"
        yield failure("mlflow", says, "pip install --upgrade mlflow, as in constraints.txt")
    elif found and known and found[0] in known.values():
        remedy = f"Copy the file, then: mlflow db upgrade sqlite:///{path}"
        yield failure("mlflow", f"{path} is of an older MLflow than {version('mlflow')}", remedy)
    else:
        yield ok("mlflow", f"{path} can be written and is of this version")


def _revisions() -> dict[str, str | None]:
    """Every revision of MLflow's tables that is installed, with the one before it; without importing it."""
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


def _server(uri: str) -> Iterator[Finding]:
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
        yield failure("mlflow", f"{place} asks for another name and password", remedy)
    elif answer.status_code == 403:
        host = httpx.URL(uri).netloc.decode()
        remedy = f"Start it with --allowed-hosts {host} (the port counts)"
        yield failure("mlflow", f"{place} refuses this host name ({answer.text[:80]})", remedy)
    elif answer.status_code != 200:
        says = f"{place} answers {answer.status_code}: {answer.text[:120]}"
        yield failure("mlflow", says, "Look whether this is the address of an MLflow server")
    else:
        told = ask("GET", f"{uri}/version", auth=auth)
        theirs = told.text.strip() if not isinstance(told, str) and told.status_code == 200 else "unknown"
        yield from _alike(place, theirs)
    yield from skew("mlflow", answer)


def _alike(place: str, theirs: str) -> Iterator[Finding]:
    ours = version("mlflow")
    if theirs.split(".")[:1] == ours.split(".")[:1]:
        yield ok("mlflow", f"{place} answers, version {theirs}")
    else:
        remedy = "Install the same on both"
        yield warning("mlflow", f"{place} is of version {theirs}, this is {ours}", remedy)


def undelivered(place: Path) -> Iterator[Finding]:
    """Newest runs that are done here and not in MLflow: what it missed is sent by a resume."""
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
        yield warning(
            "mlflow", f"{record.run_id} is done, and MLflow did not take its end", record.resume_line
        )
    if not late:
        yield ok("mlflow", f"the newest {len(done)} finished runs are delivered")


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
