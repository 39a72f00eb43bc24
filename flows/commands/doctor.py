"""The body of `dpo doctor`: runs all checks and prints their results."""

import json
import os
import shlex
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any

import typer

from dpo_core.errors import RecipeError, StageFailed
from flows.commands.deploy import check_file, reconcile
from flows.process.prefect_server import server, server_address
from tasks.housekeeping.doctor import machine, mlflow, ports, prefect, workspace
from tasks.housekeeping.doctor.check_result import CheckResult, ok, run_checks, skipped, warning
from tasks.housekeeping.doctor.http import ask
from tasks.scheduling.deployments import deployed_files, deployments_on_server

_SIGNS = {"ok": "✓", "warning": "!", "failure": "✗", "skipped": "–"}
# Keeps MLflow's client from waiting for a server that does not answer.
_IMPATIENT = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "3", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}


def diagnose(folder: Path, file: Path | None, as_json: bool) -> None:
    """Run all checks and print their results.

    Args:
        file: the deployment file to compare with the server; None: those that its deployments came from.

    Raises:
        StageFailed: a check found a failure.
    """
    os.environ.update(_IMPATIENT)
    results = run_all(folder, file)
    if as_json:
        typer.echo(json.dumps([result.model_dump() for result in results], indent=1))
    else:
        for result in results:
            typer.echo(f"{_SIGNS[result.state]} {result.check:12} {result.says}")
            if result.remedy:
                typer.echo(f"  {'':12} → {result.remedy}")
    if broken := sorted({result.check for result in results if result.state == "failure"}):
        raise StageFailed(f"broken: {', '.join(broken)}", "See the remedy below each check")


def run_all(place: Path, file: Path | None = None) -> list[CheckResult]:
    """The results of all checks; a check comes after those of the things that it needs."""
    here = [machine.packages, machine.demo_weights, machine.accelerator]
    disk = [workspace.folder, workspace.owner, workspace.disk, workspace.stuck_runs]
    return run_checks(
        [
            ("machine", [*here, machine.network]),
            ("workspace", [partial(check, place) for check in disk]),
            ("mlflow", [lambda: _with_mlflow(place)]),
            ("prefect", [prefect.home, prefect.server, partial(deploy_file, file)]),
            ("ports", [ports.usual, ports.open_to_all]),
        ]
    )


def _with_mlflow(place: Path) -> Iterator[CheckResult]:
    """The check of MLflow, and if it can be used, that of the champions."""
    (result,) = mlflow.tracking(place)
    yield result
    if result.state == "failure":
        yield skipped("champion", "MLflow cannot be used")
    else:
        yield from workspace.champions(place)


def deploy_file(file: Path | None) -> Iterator[CheckResult]:
    """The server matches the deployment file, or without one those files that its deployments came from."""
    address = server_address()
    if address is None or isinstance(ask("GET", f"{address}/health"), str):
        return
    try:
        with server() as client:
            files = [file] if file else deployed_files(deployments_on_server(client, "dpo"))
            for one in files:
                yield _compared(client, one)
    except RecipeError as error:
        yield skipped("deploy file", f"not compared with the server: {error}")
        return
    if not files:
        yield skipped("deploy file", "not compared with the server: name it with --file")


def _compared(client: Any, file: Path) -> CheckResult:
    if not file.is_file():
        return skipped("deploy file", f"not compared with the server: {file} is not on this machine")
    try:
        plan = reconcile(client, check_file(file), None, dry_run=True, prune=False)
    except RecipeError as error:
        return skipped("deploy file", f"{file} is not compared with the server: {error}")
    if changes := plan["changes"]:
        first = shorten(changes[0]["text"], 160, placeholder=" …")
        return warning(
            "deploy file",
            f"{len(changes)} differences to the server, first: {first}",
            f"dpo deploy --file {shlex.quote(str(file))} --dry-run shows all, without it they are applied",
        )
    return ok("deploy file", f"the server matches {file}")
