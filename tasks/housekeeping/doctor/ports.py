"""Checks of what listens on this machine: the ports that are to be used, and servers open to others."""

import socket
from collections.abc import Iterator
from contextlib import suppress
from ipaddress import ip_address
from typing import Any

import psutil

from tasks.housekeeping.doctor.finding import Finding, failure, ok, warning
from tasks.housekeeping.doctor.http import ask

_USUAL = {4200: ("Prefect", "/api/admin/version"), 5000: ("MLflow", "/version")}
_CHANGE = {4200: "prefect server start --port N", 5000: "dpo ui --port N"}
# A question that only a server without passwords answers.
_OPEN = {
    "MLflow": (
        "GET",
        "/api/2.0/mlflow/experiments/search?max_results=1",
        "mlflow server --app-name basic-auth",
    ),
    "Prefect": ("POST", "/api/flows/count", "PREFECT_SERVER_API_AUTH_STRING=user:password"),
}


def usual(ports: dict[int, tuple[str, str]] | None = None) -> Iterator[Finding]:
    """The usual ports are free, or taken by what they are for."""
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
            says = f"{port}, where {what} would listen, is taken by {_holder(port)}"
            yield warning("ports", says, f"Stop it, or choose another: {_CHANGE.get(port, 'another port')}")


def _holder(port: int) -> str:
    for pid, _, process in _listening(port):
        return f"process {pid} ({process.name()})"
    return "a process of another user, or of another container"


def _listening(port: int | None = None) -> Iterator[tuple[int, tuple[str, int], psutil.Process]]:
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            for one in process.net_connections(kind="tcp"):
                if one.status == psutil.CONN_LISTEN and port in (None, one.laddr.port):
                    yield process.pid, (one.laddr.ip, one.laddr.port), process


def open_to_all() -> Iterator[Finding]:
    """No MLflow or Prefect of this user's listens to other machines and asks for no password."""
    found, bad = set(), 0
    for pid, (host, port), process in _listening():
        what = _kind(process)
        if what is None or _own(host) or port in found:
            continue
        found.add(port)
        method, path, remedy = _OPEN[what]
        asked = "127.0.0.1" if ip_address(host).is_unspecified else host
        given: dict[str, Any] = {"json": {}} if method == "POST" else {}
        answer = ask(method, f"http://{asked}:{port}{path}", **given)
        if not isinstance(answer, str) and answer.status_code == 200:
            bad += 1
            says = f"{what} (process {pid}) listens on {host}:{port} and asks nobody for a password"
            yield failure("exposure", says, f"Bind it to 127.0.0.1, or: {remedy}")
    if not bad:
        yield ok("exposure", "no server of this user's is open to other machines without a password")


def _kind(process: psutil.Process) -> str | None:
    line = " ".join(process.cmdline())
    return "MLflow" if "mlflow" in line else "Prefect" if "prefect" in line else None


def _own(host: str) -> bool:
    return ip_address(host.split("%", maxsplit=1)[0]).is_loopback
