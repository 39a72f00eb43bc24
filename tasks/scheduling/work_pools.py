"""Checks that a deployment's work pool exists on the server and accepts its job variables."""

import difflib
from importlib import resources
from typing import Any

from prefect.exceptions import ObjectNotFound
from prefect.utilities.schema_tools import ValidationError, validate

from dpo_core.errors import RecipeError
from tasks.scheduling.deployment_file import Deployment


def require_work_pool(client: Any, deployment: Deployment) -> None:
    """Check the work pool of a deployment.

    Raises:
        RecipeError: the server has no such work pool, or the pool's template rejects the job variables.
    """
    pool = deployment.work_pool.name
    try:
        existing = client.read_work_pool(pool)
    except ObjectNotFound as error:
        raise RecipeError(
            f"{deployment.name}: the server has no work pool {pool}",
            f"Create it: {creation(pool, 'process')}",
        ) from error
    check_job_variables(deployment, existing.type, existing.base_job_template)


def creation(pool: str, kind: str) -> str:
    """The command that creates a pool from this package's template."""
    template = resources.files("deploy") / "work_pools" / f"{kind}.json"
    shown = f" --base-job-template {template}" if template.is_file() else ""
    return f"prefect work-pool create {pool} --type {kind}{shown}"


def check_job_variables(deployment: Deployment, kind: str, template: dict[str, Any]) -> None:
    """Check a deployment's job variables against the template of its pool.

    Prefect checks the types of known variables when the deployment is created, reports missing ones only when
    a run starts, and silently ignores unknown ones.

    Raises:
        RecipeError: a variable is unknown, missing or of the wrong type.
    """
    schema = template.get("variables")
    if not schema:
        return  # a pool without a template gets that of its first worker
    known = schema.get("properties", {})
    pool, variables = deployment.work_pool.name, deployment.work_pool.job_variables
    where = f"{deployment.name}: work_pool.job_variables"
    for name in variables:
        if name.partition(".")[0] not in known:  # env.NAME sets one name of env
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" (did you mean {near[0]}?)" if near else f"; known are {', '.join(known)}"
            raise RecipeError(
                f"{where}: the pool {pool}, of type {kind}, has no {name}{hint}",
                f"Correct it, or give the pool this package's template: {creation(pool, kind)} --overwrite",
            )
    defaults = {name: field["default"] for name, field in known.items() if field.get("default") is not None}
    plain = {name: value for name, value in variables.items() if "." not in name}
    try:
        validate(defaults | plain, schema, raise_on_error=True)
    except ValidationError as error:
        fault = str(error).removeprefix("Validation failed. ").removeprefix("Validation failed for ")
        raise RecipeError(
            f"{where}: {fault}", f"See the pool's template: prefect work-pool inspect {pool}"
        ) from error
