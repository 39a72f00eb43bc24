"""`dpo ui`: the MLflow UI on a workspace, in the foreground."""

import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import webbrowser

from dpo_core.errors import RecipeError, StageFailed
from tasks.store import open_workspace
from tasks.tracking import TrackingConfig, resolve_uri


def serve(workspace: str, host: str, port: int, browser: bool) -> None:
    """Serve until interrupted. A tracking server that is set in the environment is opened as it is.

    Raises:
        RecipeError: nothing was tracked there yet, or the port is taken.
    """
    place = open_workspace(workspace)
    uri = resolve_uri(TrackingConfig(), place)
    print("prefect  prefect server start   (then http://127.0.0.1:4200; needs PREFECT_API_URL in the runs)")
    if uri.startswith("http"):
        print(f"mlflow   {uri}", flush=True)
        if browser:
            webbrowser.open(uri)
        return
    if not (place / "mlflow.db").exists() and uri.startswith("sqlite"):
        raise RecipeError(f"nothing was tracked in {place} yet", "Run a recipe first, or name --workspace")
    _require_free(host, port)
    address = f"http://{host}:{port}"
    command = [
        sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri,
        "--default-artifact-root", (place / "mlartifacts").as_uri(),
        "--host", host, "--port", str(port), "--workers", "1",
    ]  # fmt: skip
    process = subprocess.Popen(command, env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"})
    threading.Thread(target=_announce, args=(process, address, browser), daemon=True).start()
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        return
    if code:
        raise StageFailed(f"the MLflow UI ended with status {code}", "Its last lines above say why")


def _require_free(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise RecipeError(f"{host}:{port} cannot be used ({error.strerror})", "Choose --port") from error


def _announce(process: "subprocess.Popen[bytes]", address: str, browser: bool) -> None:
    """Say where the UI is once it answers."""
    while process.poll() is None:
        try:
            urllib.request.urlopen(f"{address}/health", timeout=2)
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
            continue
        print(f"mlflow   {address}", flush=True)
        if browser:
            webbrowser.open(address)
        return
