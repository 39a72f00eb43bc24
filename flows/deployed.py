"""The flow of deployments: a worker runs it with the name of a recipe, as `dpo run` does."""

import os
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run

from dpo_core.system import end_with_parent
from flows.process.environment import keep_quiet
from flows.process.leases import outlive_leases

if "PREFECT__FLOW_RUN_ID" in os.environ:
    # Without its worker, the run would continue unseen, and no button would stop it. Before the slow imports.
    end_with_parent()
keep_quiet()
outlive_leases()


def run_name() -> str:
    """Prefect's name of the run: the recipe's name, or the file's name without its suffix."""
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
        data: a data set to use in place of the recipe's: a file, a folder or a hub name.
        resume: name of an earlier run to resume, or latest.
        on: where its jobs run: local, kubernetes, slurm or skypilot.
        settings: a YAML file with the settings of that cluster (dpo config cluster).
    """
    # MLflow and Great Expectations must be imported after `keep_quiet`.
    from flows.commands.worker_run import run_on_worker  # noqa: PLC0415

    return run_on_worker(recipe, overrides or [], data, resume, on, settings)
