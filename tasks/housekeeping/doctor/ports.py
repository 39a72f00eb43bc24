"""Checks of network ports: the default ports are available, and no server is open without a password."""

import socket
from collections.abc import Iterator
from contextlib import suppress
from ipaddress import ip_address
from typing import Any

import psutil

from tasks.housekeeping.doctor.check_result import CheckResult, failure, ok, warning
from tasks.housekeeping.doctor.http import ask

_USUAL = {4200: ("Prefect", "/api/admin/version"), 5000: ("MLflow", "/version")}
_CHANGE = {4200: "prefect server start --port N", 5000: "dpo ui --port N"}
# Requests that only a server without passwords answers.
_OPEN = {
    "MLflow": (
        "GET",
        "/api/2.0/mlflow/experiments/search?max_results=1",
        "mlflow server --app-name basic-auth",
    ),
    "Prefect": ("POST", "/api/flows/count", "PREFECT_SERVER_API_AUTH_STRING=user:password"),
}


def usual(ports: dict[int, tuple[str, str]] | None = None) -> Iterator[CheckResult]:
    """The default ports are free, or used by the servers that they are for."""
    for port, (what, path) in (ports or _USUAL).items():
        with socket.socket() as probe:
            probe.settimeout(1)
            if probe.connect_ex(("127.0.0.1", port)):
                yield ok("ports", f"{port} is free for {what}")
                continue
        answer = ask("GET", f"http://127.0.0.1:{port}{path}")
        if not isinstance(answer, str) and (answer.status_code in (200, 401)) and len(answer.text) < 80:
            yield ok("ports", f"{what} answers on {port}")
        else:
            says = f"port {port} of {what} is in use by {_holder(port)}"
            yield warning("ports", says, f"Stop it, or choose another: {_CHANGE.get(port, 'another port')}")


def _holder(port: int) -> str:
    for pid, _, process in _listening(port):
        return f"process {pid} ({process.name()})"
    return "a process of another user, or of another container"


def _listening(port: int | None = None) -> Iterator[tuple[int, tuple[str, int], psutil.Process]]:
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            for connection in process.net_connections(kind="tcp"):
                ip, number = connection.laddr.ip, connection.laddr.port
                if connection.status == psutil.CONN_LISTEN and port in (None, number):
                    yield process.pid, (ip, number), process


def open_to_all() -> Iterator[CheckResult]:
    """No MLflow or Prefect server of this user accepts connections from other machines without a password."""
    checked, bad = set(), 0
    for pid, (host, port), process in _listening():
        what = _kind(process)
        if what is None or _is_loopback(host) or port in checked:
            continue
        checked.add(port)
        method, path, remedy = _OPEN[what]
        address = "127.0.0.1" if ip_address(host).is_unspecified else host
        body: dict[str, Any] = {"json": {}} if method == "POST" else {}
        answer = ask(method, f"http://{address}:{port}{path}", **body)
        if not isinstance(answer, str) and answer.status_code == 200:
            bad += 1
            says = f"{what} (process {pid}) listens on {host}:{port} without a password"
            yield failure("exposure", says, f"Bind it to 127.0.0.1, or: {remedy}")
    if not bad:
        yield ok("exposure", "no server of this user is open to other machines without a password")


def _kind(process: psutil.Process) -> str | None:
    line = " ".join(process.cmdline())
    return "MLflow" if "mlflow" in line else "Prefect" if "prefect" in line else None


def _is_loopback(host: str) -> bool:
    return ip_address(host.split("%", maxsplit=1)[0]).is_loopback
