"""The flow that a worker runs: a recipe by its name, as `dpo run` does, and an end that says what it was."""

import logging
import os
import shlex
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from dpo_core.errors import DpoError, RecipeError
from dpo_core.yaml import quoted
from flows.process.environment import keep_quiet
from flows.process.leases import outlive_leases

keep_quiet()
outlive_leases()

GATE_REFUSED = "GateRefused"
PROMOTION_REFUSED = "PromotionRefused"
# By the exit code of the error (dpo_core.errors). Each becomes an event: prefect.flow-run.GateRefused.
_ENDS = {3: GATE_REFUSED, 5: PROMOTION_REFUSED}


def run_name() -> str:
    """What Prefect calls the run: its recipe, of one that is named by its path the file's name."""
    from prefect.runtime import flow_run

    recipe = str(flow_run.parameters["recipe"])
    return Path(recipe).stem if recipe.endswith((".yaml", ".yml")) else recipe


@flow(name="dpo", flow_run_name=run_name, log_prints=False, persist_result=False)
def deployed(
    recipe: str,
    overrides: list[str] | None = None,
    data: str | None = None,
    resume: str | None = None,
    on: str = "local",
    settings: str | None = None,
) -> State[Any]:
    """Run a recipe on a worker.

    Args:
        recipe: a shipped recipe (dpo config list), or the path of a YAML file on the worker's machine.
        overrides: fields of the recipe, each as a.b=value.
        data: a data set to take in place of the recipe's own: a file, a folder or a hub name.
        resume: name of an earlier run to go on with, or latest.
        on: where its training jobs run: local, kubernetes, slurm or skypilot.
        settings: a YAML file with the settings of that cluster (dpo config cluster).
    """
    from flows import alignment
    from flows.process.guard import guarded
    from flows.run_lifecycle import recorded

    log = logging.getLogger("dpo")
    log.setLevel(logging.INFO)
    try:
        from flows.cli.launch import read_cluster
        from tasks.recipe.read import load_recipe

        sets = [*(overrides or []), *data_overrides(data)]
        cluster = read_cluster(on, settings, [])
        resolved = load_recipe(recipe, sets)
        with guarded(resolved.workspace, resolved.tracking):
            command = command_of(recipe, sets, on, settings)
            report = recorded(resolved, resume, alignment.run_stages, command, cluster)
    except DpoError as error:
        log.error("%s", error)
        return Failed(name=_ENDS.get(error.exit_code, "Failed"), message=str(error))
    return Completed(message=f"run {report.run.name}")


def data_overrides(data: str | None) -> list[str]:
    """What puts a data set in the place of the recipe's own. JSON: a path is no YAML of its own.

    Raises:
        RecipeError: the data set lies outside of the folder that `DPO_DATA` names on this machine.
    """
    if data is None:
        return []
    from dpo_core.data.files.confined import confine

    allowed = os.environ.get("DPO_DATA")
    # Whoever may send events to the server names the file; links are followed before it is looked at.
    if allowed and not Path(data).expanduser().resolve().is_relative_to(Path(allowed).expanduser().resolve()):
        raise RecipeError(
            f"the data set {data} is not in {allowed}, and this worker takes no other (DPO_DATA)",
            "Put it there, or name another folder in DPO_DATA where the worker is started",
        )
    if allowed:
        confine(data, Path(allowed))
    return [f"data.path={quoted(data)}", "data.openings=null", "data.mixture=null"]


def command_of(recipe: str, overrides: list[str], on: str = "local", settings: str | None = None) -> str:
    """The command that does the same by hand."""
    sets = [part for one in overrides for part in ("--set", one)]
    if on == "local":
        return shlex.join(["dpo", "run", recipe, *sets])
    where = ["--on", on, *(["--settings", settings] if settings else [])]
    return shlex.join(["dpo", "launch", recipe, *where, *sets])
