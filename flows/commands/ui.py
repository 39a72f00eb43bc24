"""The body of `dpo ui`: runs the MLflow UI on a workspace in the foreground."""

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
from dpo_core.redaction import redact
from flows.commands.ui_access import Access, access
from flows.process.prefect_server import server_address
from tasks.recipe.sections import TrackingConfig
from tasks.runs.record import list_runs
from tasks.store.files import open_workspace
from tasks.tracking.connection import resolve_uri
from tasks.tracking.tracker import VIEW

# MLflow's job runners, ten processes and two gigabytes, are not needed.
_SERVER = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
_GRACE_SECONDS = 10.0
# By default MLflow's UI shows prompts and traces; this selects model training.
_TRAINING = "#/experiments?workflowType=machine_learning"


def serve(workspace: str, host: str, port: int, browser: bool) -> None:
    """Serve until interrupted, then end all processes. A server in MLFLOW_TRACKING_URI is only opened.

    Raises:
        RecipeError: nothing was tracked yet, the port is taken, or the network could read without a password.
        StageFailed: the MLflow UI failed.
    """
    place = open_workspace(workspace)
    uri = resolve_uri(TrackingConfig(), place)
    api = server_address()
    start = "PREFECT_SERVER_ANALYTICS_ENABLED=false prefect server start   (then set PREFECT_API_URL)"
    print(f"prefect  {redact(api.removesuffix('/api')) if api else start}")
    if uri.startswith("http"):
        shown = redact(uri)
        print(f"mlflow   {shown}", flush=True)
        if browser:
            webbrowser.open(shown)  # without secrets, because all users can read a command line
        return
    if not (place / "mlflow.db").exists() and uri.startswith("sqlite"):
        raise RecipeError(f"nothing was tracked in {place} yet", "Run a recipe first, or set --workspace")
    login = access(host, place)
    _require_free(host, port)
    command = [
        sys.executable, "-P", "-m", "mlflow", "ui", *login.options,
        "--default-artifact-root", (place / "mlartifacts").as_uri(),
        "--host", host, "--port", str(port), "--workers", "1",
        "--uvicorn-opts", "--log-level warning",
    ]  # fmt: skip
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, signal.default_int_handler)
    # In its own session, so that the server can be stopped with all its processes. The database's address is
    # passed in the environment, because it may contain a password and all users can read a command line.
    environment = {**os.environ, **_SERVER, "MLFLOW_BACKEND_STORE_URI": uri, **login.environment}
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        arguments = (process, place, f"http://{host}:{port}", login, browser)
        threading.Thread(target=_announce, args=arguments, daemon=True).start()
        code = process.wait()
    except KeyboardInterrupt:
        return
    finally:
        _stop(process)
    raise StageFailed(f"the MLflow UI ended with status {code}", "See its last lines above")


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """End the server and its processes: SIGTERM, then SIGKILL after a grace time."""
    deadline = time.monotonic() + _GRACE_SECONDS
    with suppress(ProcessLookupError):  # all have ended
        os.killpg(process.pid, signal.SIGTERM)
        while time.monotonic() < deadline:
            process.poll()  # otherwise the ended server stays in the group as a zombie
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
            raise RecipeError(
                f"{host}:{port} cannot be used ({error.strerror})", "Set another --port"
            ) from error


def _announce(
    process: "subprocess.Popen[bytes]", place: Path, address: str, login: Access, browser: bool
) -> None:
    """Print the addresses of the UI and of the newest run in it, once the UI answers."""
    while process.poll() is None:
        try:
            urllib.request.urlopen(f"{address}/health", timeout=2)
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
            continue
        print(f"mlflow   {address}/{_TRAINING}", flush=True)
        runs, run, page = _newest_run(place, address, login)
        if run:
            print(f"runs     {runs}", flush=True)
            print(f"newest   {run}", flush=True)
        if page:
            print(f"page     {page}", flush=True)
        if browser:
            webbrowser.open(run or f"{address}/{_TRAINING}")
        return


def _newest_run(place: Path, address: str, login: Access) -> tuple[str | None, str | None, str | None]:
    """The addresses in the UI of the newest run's table, with verdict and gain, and of the run itself, and of
    its run page; None if one does not exist."""
    newest = next((record for record in list_runs(place) if record.mlflow_run_id), None)
    if newest is None:
        return None, None, None
    page = place / "runs" / newest.run_id / "page.html"
    runs = run = None
    query = urllib.request.Request(
        f"{address}/api/2.0/mlflow/runs/get?run_id={newest.mlflow_run_id}", headers=login.headers
    )
    with suppress(OSError, ValueError, KeyError), urllib.request.urlopen(query, timeout=10) as reply:
        experiment = json.load(reply)["run"]["info"]["experiment_id"]
        run = f"{address}/{_TRAINING}".replace("?", f"/{experiment}/runs/{newest.mlflow_run_id}?")
        runs = f"{address}/{_TRAINING}".replace("?", f"/{experiment}/runs?viewStateShareKey={VIEW}&")
    return runs, run, page.as_uri() if page.is_file() else None
