"""`dpo ui`: the MLflow UI on a workspace, in the foreground."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import webbrowser
from contextlib import suppress
from pathlib import Path

from dpo_core.errors import RecipeError, StageFailed
from dpo_core.redaction import hidden
from flows.cli.ui_access import Access, access
from flows.process.prefect_server import server_address
from tasks.recipe.sections import TrackingConfig
from tasks.store.files import open_workspace
from tasks.tracking.tracker import resolve_uri

# Runners of jobs that this pipeline never gives to MLflow: ten processes and two gigabytes.
_SERVER = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
_GRACE_SECONDS = 10.0
# MLflow's UI begins with prompts and traces; this asks it for what concerns trained models.
_TRAINING = "#/experiments?workflowType=machine_learning"


def serve(workspace: str, host: str, port: int, browser: bool) -> None:
    """Serve until interrupted, then leave no process. A server that the environment names is only opened.

    Raises:
        RecipeError: nothing was tracked there yet, the port is taken, or others could look in unasked.
        StageFailed: the MLflow UI ended by itself.
    """
    place = open_workspace(workspace)
    uri = resolve_uri(TrackingConfig(), place)
    api = server_address()
    started = "PREFECT_SERVER_ANALYTICS_ENABLED=false prefect server start   (then set PREFECT_API_URL)"
    print(f"prefect  {hidden(api.removesuffix('/api')) if api else started}")
    if uri.startswith("http"):
        shown = hidden(uri)
        print(f"mlflow   {shown}", flush=True)
        if browser:
            webbrowser.open(shown)  # a command line, which every user of the machine may read
        return
    if not (place / "mlflow.db").exists() and uri.startswith("sqlite"):
        raise RecipeError(f"nothing was tracked in {place} yet", "Run a recipe first, or name --workspace")
    door = access(host, place)
    _require_free(host, port)
    command = [
        sys.executable, "-P", "-m", "mlflow", "ui", *door.options,
        "--default-artifact-root", (place / "mlartifacts").as_uri(),
        "--host", host, "--port", str(port), "--workers", "1",
        "--uvicorn-opts", "--log-level warning",
    ]  # fmt: skip
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, signal.default_int_handler)
    # A session of its own, so that all of the server can be stopped, whoever is asked to stop.
    # The database's address may hold a password, and a command line is read by every user of the machine.
    environment = {**os.environ, **_SERVER, "MLFLOW_BACKEND_STORE_URI": uri, **door.environment}
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        told = (process, place, f"http://{host}:{port}", door, browser)
        threading.Thread(target=_announce, args=told, daemon=True).start()
        code = process.wait()
    except KeyboardInterrupt:
        return
    finally:
        _stop(process)
    raise StageFailed(f"the MLflow UI ended with status {code}", "Its last lines above say why")


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """End the server and the processes that it started: politely, then by force."""
    deadline = time.monotonic() + _GRACE_SECONDS
    with suppress(ProcessLookupError):  # nobody of the group is left
        os.killpg(process.pid, signal.SIGTERM)
        while time.monotonic() < deadline:
            process.poll()  # else the ended server stays in its own group
            os.killpg(process.pid, 0)
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _require_free(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise RecipeError(f"{host}:{port} cannot be used ({error.strerror})", "Choose --port") from error


def _announce(
    process: "subprocess.Popen[bytes]", place: Path, address: str, door: Access, browser: bool
) -> None:
    """Say where the UI is once it answers, and where the newest run is in it."""
    while process.poll() is None:
        try:
            urllib.request.urlopen(f"{address}/health", timeout=2)
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
            continue
        print(f"mlflow   {address}/{_TRAINING}", flush=True)
        run, page = _newest_run(place, address, door)
        if run:
            print(f"newest   {run}", flush=True)
        if page:
            print(f"page     {page}", flush=True)
        if browser:
            webbrowser.open(run or f"{address}/{_TRAINING}")
        return


def _newest_run(place: Path, address: str, door: Access) -> tuple[str | None, str | None]:
    """Where the newest run is in the UI, and the address of its run page; None for what there is not."""
    from tasks.runs.record import list_runs

    newest = next((record for record in list_runs(place) if record.mlflow_run_id), None)
    if newest is None:
        return None, None
    page = place / "runs" / newest.run_id / "page.html"
    run = None
    query = urllib.request.Request(
        f"{address}/api/2.0/mlflow/runs/get?run_id={newest.mlflow_run_id}", headers=door.headers
    )
    with suppress(OSError, ValueError, KeyError), urllib.request.urlopen(query, timeout=10) as reply:
        experiment = json.load(reply)["run"]["info"]["experiment_id"]
        run = f"{address}/{_TRAINING}".replace("?", f"/{experiment}/runs/{newest.mlflow_run_id}?")
    return run, page.as_uri() if page.is_file() else None
