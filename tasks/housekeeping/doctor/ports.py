"""Checks of network ports: the default ports are available, and no server is open without a password."""

from collections.abc import Iterator
from contextlib import suppress
from ipaddress import ip_address
from typing import Any

import psutil

from tasks.housekeeping.doctor.check_result import CheckResult, failure, ok, warning
from tasks.housekeeping.doctor.http import ask

_USUAL = {4200: ("prefect", "prefect server start --port N"), 5000: ("mlflow", "dpo ui --port N")}
# Requests that only a server without passwords answers.
_OPEN = {
    "mlflow": (
        "GET",
        "/api/2.0/mlflow/experiments/search?max_results=1",
        "mlflow server --app-name basic-auth",
    ),
    "prefect": ("POST", "/api/flows/count", "PREFECT_SERVER_API_AUTH_STRING=user:password"),
}


def _listening() -> Iterator[tuple[str, int, str]]:
    """Address, port and process, with its command, of every listening socket."""
    for connection in psutil.net_connections(kind="tcp"):
        if connection.status == psutil.CONN_LISTEN:
            process = "a process of another user, or of another container"
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if connection.pid:
                    command = " ".join(psutil.Process(connection.pid).cmdline())
                    process = f"process {connection.pid} ({command})"
            yield connection.laddr.ip, connection.laddr.port, process


def usual() -> Iterator[CheckResult]:
    """The default ports are free, or used by the servers that they are for."""
    used = {port: process for _, port, process in _listening()}
    for port, (server, change) in _USUAL.items():
        if port not in used:
            yield ok("ports", f"{port} is free for {server}")
        elif server in used[port]:
            yield ok("ports", f"{server} has port {port}")
        else:
            says = f"port {port} of {server} is in use by {used[port][:100]}"
            yield warning("ports", says, f"Stop it, or choose another: {change}")


def open_to_all() -> Iterator[CheckResult]:
    """No MLflow or Prefect server of this user accepts connections from other machines without a password."""
    checked, bad = set(), 0
    for host, port, process in _listening():
        server = next((name for name in _OPEN if name in process), None)
        address = ip_address(host.split("%", maxsplit=1)[0])
        if server is None or address.is_loopback or port in checked:
            continue
        checked.add(port)
        method, path, remedy = _OPEN[server]
        body: dict[str, Any] = {"json": {}} if method == "POST" else {}
        answer = ask(method, f"http://{'127.0.0.1' if address.is_unspecified else host}:{port}{path}", **body)
        if not isinstance(answer, str) and answer.status_code == 200:
            bad += 1
            says = f"{process[:100]} listens on {host}:{port} without a password"
            yield failure("exposure", says, f"Bind it to 127.0.0.1, or: {remedy}")
    if not bad:
        yield ok("exposure", "no server of this user is open to other machines without a password")
