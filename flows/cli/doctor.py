"""`dpo doctor`: look for the common faults, and say what to do about each."""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.cli.options import JsonOption, SetOption

if TYPE_CHECKING:
    from tasks.housekeeping.doctor.finding import Finding

_SIGNS = {"ok": "✓", "warning": "!", "failure": "✗", "skipped": "–"}
# MLflow's client, where a check needs it, is not to wait for a server that is away.
_IMPATIENT = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "3", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}


def doctor(
    workspace: Annotated[str, typer.Option(help="Workspace folder.")] = "./runs",
    model: Annotated[
        str | None, typer.Option(help="Check only whether this model can be aligned, named as in a recipe.")
    ] = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Look for common faults of packages, workspace, MLflow, Prefect, ports and promotions. Changes nothing.

    Exit code 4: something is broken.
    """
    import json

    from dpo_core.errors import RecipeError, StageFailed
    from tasks.store.files import open_workspace

    if model is not None:
        _check_model(model, overrides or [], open_workspace(workspace), as_json)
        return
    if overrides:
        raise RecipeError("--set is read with --model alone", "Name a model, or leave --set out")
    os.environ.update(_IMPATIENT)
    found = look(open_workspace(workspace))
    if as_json:
        typer.echo(json.dumps([finding.model_dump() for finding in found], indent=1))
    else:
        for finding in found:
            typer.echo(f"{_SIGNS[finding.state]} {finding.check:12} {finding.says}")
            if finding.remedy:
                typer.echo(f"  {'':12} → {finding.remedy}")
    if broken := sorted({finding.check for finding in found if finding.state == "failure"}):
        raise StageFailed(f"broken: {', '.join(broken)}", "What to do stands beside each")


def _check_model(name: str, overrides: list[str], workspace: Path, as_json: bool) -> None:
    """One line: packed, padded (why) or refused (why, and what to use instead)."""
    import json

    from dpo_core.config import Config
    from dpo_core.data.tokens.tokenise import TokenConfig
    from dpo_core.model_check import REMEDY, check_named
    from dpo_core.models.config import ModelConfig
    from dpo_core.scoring.precision import Precision
    from tasks.promotion.model_source import as_folder
    from tasks.recipe.read import with_overrides

    class Checked(Config):
        """The slices of a recipe that the check reads."""

        model: ModelConfig
        tokens: TokenConfig = TokenConfig()
        precision: Precision = "bf16"

    slices = {"model": {"name": name}, "tokens": {}}
    asked = with_overrides(Checked, slices, overrides, f"{name} cannot be checked", "Correct the override")
    longest = asked.tokens.max_length if "max_length" in asked.tokens.model_fields_set else None
    model, _ = as_folder(asked.model, workspace)
    check = check_named(model, precision=asked.precision, longest=longest)
    if as_json:
        typer.echo(json.dumps({"layout": check.layout, "reason": check.reason, "sampling": check.sampling}))
    else:
        typer.echo(f"{check.layout}: {check.reason}")
        if check.layout == "refused":
            typer.echo(REMEDY)
    if check.layout == "refused":
        raise typer.Exit(4)


def look(place: Path) -> "list[Finding]":
    """The findings of every check, in the order in which things are needed."""
    from tasks.housekeeping.doctor import machine, mlflow, ports, prefect, workspace
    from tasks.housekeeping.doctor.finding import run_checks

    here = [machine.python, machine.packages, machine.compiler, machine.demo_weights, machine.accelerator]
    disk = [workspace.folder, workspace.owner, workspace.disk, workspace.clock, workspace.stuck_runs]
    tracked = [mlflow.undelivered, workspace.garbage, workspace.champions]
    return run_checks(
        [
            ("machine", [*here, machine.network, orphans]),
            ("workspace", [partial(check, place) for check in (*disk, workspace.leftovers)]),
            ("mlflow", [lambda: _with_mlflow(place, tracked)]),
            ("prefect", [prefect.credentials, prefect.home, prefect.server, deploy_file]),
            ("ports", [ports.usual, ports.open_to_all]),
        ]
    )


def _with_mlflow(place: Path, checks: list[Any]) -> "Iterator[Finding]":
    """The checks that ask MLflow, once it is known to answer."""
    from tasks.housekeeping.doctor import mlflow
    from tasks.housekeeping.doctor.finding import skipped

    state = "ok"
    for finding in mlflow.tracking(place):
        yield finding
        state = finding.state if finding.state == "failure" else state
    if state == "failure":
        yield skipped("champion", "MLflow has to answer first")
        return
    for check in checks:
        yield from check(place)


def orphans() -> "Iterator[Finding]":
    """Nothing lives on that a killed run had started."""
    from flows.process.orphans import find_orphans
    from tasks.housekeeping.doctor.finding import ok, warning

    left = find_orphans()
    if left:
        pids = " ".join(str(process.pid) for process in left)
        says = f"{len(left)} processes of killed runs live on: {pids}"
        yield warning("orphans", says, f"The next dpo run ends its servers; all of them: kill {pids}")
    else:
        yield ok("orphans", "no process of a killed run lives on")


def deploy_file() -> "Iterator[Finding]":
    """The server holds what the deploy file says."""
    from flows.cli.deploy import check_deployment, default_file, reconcile
    from flows.process.prefect_server import server, server_address
    from tasks.housekeeping.doctor.finding import ok, skipped, warning
    from tasks.housekeeping.doctor.http import ask

    address = server_address()
    if address is None or isinstance(ask("GET", f"{address}/health"), str):
        return
    from deploy.prefect_file import read_prefect_file
    from dpo_core.errors import RecipeError

    try:
        checked, _ = read_prefect_file(default_file(), os.environ)
        flows = {one.name: check_deployment(one) for one in checked.deployments}
        told: dict[str, Any] = {"notes": []}
        with server() as client:
            reconcile(client, checked.deployments, flows, None, told, dry_run=True, prune=False)
    except RecipeError as error:
        yield skipped("deploy file", f"not compared with the server: {error}")
        return
    if told["changes"]:
        says = f"{len(told['changes'])} differences to the server, first: {told['changes'][0]['text'][:100]}"
        yield warning("deploy file", says, "dpo deploy --dry-run shows all, dpo deploy applies them")
    else:
        yield ok("deploy file", f"{default_file()} is what the server holds")
