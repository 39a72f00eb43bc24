"""The body of the deployed flow: runs a recipe on a worker, and maps its errors to Prefect's final states."""

import logging
import os
import shlex
from pathlib import Path
from typing import Any

from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from dpo_core.data.files.confined import confine
from dpo_core.errors import DpoError, RecipeError
from dpo_core.yaml import quoted
from flows import alignment
from flows.commands.cluster import read_cluster
from flows.run_lifecycle import run_with_record
from tasks.recipe.read import load_recipe

# State names by exit code (dpo_core.errors). Each becomes an event such as prefect.flow-run.GateRefused.
_STATES = {3: "GateRefused", 5: "PromotionRefused"}


def run_on_worker(
    recipe: str,
    overrides: list[str],
    data: str | None,
    resume: str | None,
    on: str,
    settings: str | None,
) -> State[Any]:
    """Run the recipe and return the final state of its flow run."""
    log = logging.getLogger("dpo")
    log.setLevel(logging.INFO)
    try:
        sets = [*overrides, *data_overrides(data)]
        cluster = read_cluster(on, settings, [])
        resolved = load_recipe(recipe, sets)
        command = command_of(recipe, sets, on, settings)
        report = run_with_record(resolved, resume, alignment.run_stages, command, cluster)
    except DpoError as error:
        log.error("%s", error)
        return Failed(name=_STATES.get(error.exit_code, "Failed"), message=str(error))
    return Completed(message=f"run {report.run.name}")


def data_overrides(data: str | None) -> list[str]:
    """The overrides that replace the recipe's data set; quoted, so that a path is not parsed as YAML.

    Raises:
        RecipeError: the data set is outside the folder that `DPO_DATA` names on this machine.
    """
    if data is None:
        return []
    allowed = os.environ.get("DPO_DATA")
    # Anyone who may send events to the server chooses the path, so links are resolved first.
    if allowed and not Path(data).expanduser().resolve().is_relative_to(Path(allowed).expanduser().resolve()):
        raise RecipeError(
            f"the data set {data} is not in {allowed}, the only folder that this worker accepts (DPO_DATA)",
            "Move it there, or set DPO_DATA to another folder where the worker is started",
        )
    if allowed:
        confine(data, Path(allowed))
    return [f"data.path={quoted(data)}", "data.openings=null", "data.mixture=null"]


def command_of(recipe: str, overrides: list[str], on: str = "local", settings: str | None = None) -> str:
    """The command that starts the same run by hand."""
    sets = [part for override in overrides for part in ("--set", override)]
    if on == "local":
        return shlex.join(["dpo", "run", recipe, *sets])
    where = ["--on", on, *(["--settings", settings] if settings else [])]
    return shlex.join(["dpo", "launch", recipe, *where, *sets])
