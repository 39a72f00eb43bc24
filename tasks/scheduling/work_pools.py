"""Work pools on a Prefect server: whether a deployment's runs can go there as it says."""

import difflib
from importlib import resources
from typing import Any

from deploy.prefect_file import Deployment
from dpo_core.errors import RecipeError


def require_work_pool(client: Any, deployment: Deployment) -> None:
    """Refuse to deploy where no worker could ever take the runs.

    Raises:
        RecipeError: the server has no such work pool, or its template has no such job variables.
    """
    from prefect.exceptions import ObjectNotFound

    pool = deployment.work_pool.name
    try:
        found = client.read_work_pool(pool)
    except ObjectNotFound as error:
        raise RecipeError(
            f"{deployment.name}: the server has no work pool {pool}", f"Make it: {creation(pool, 'process')}"
        ) from error
    check_job_variables(deployment, found.type, found.base_job_template)


def creation(pool: str, kind: str) -> str:
    """The command that makes a pool from the template of this package."""
    template = resources.files("deploy") / "work_pools" / f"{kind}.json"
    shown = f" --base-job-template {template}" if template.is_file() else ""
    return f"prefect work-pool create {pool} --type {kind}{shown}"


def check_job_variables(deployment: Deployment, kind: str, template: dict[str, Any]) -> None:
    """Hold a deployment's job variables against the template of its pool.

    Prefect checks the types of those it knows when the deployment is made, says that one is missing when a
    run is, and leaves unknown ones out without a word.

    Raises:
        RecipeError: one is unknown, missing, or of another type.
    """
    from prefect.utilities.schema_tools import ValidationError, validate

    schema = template.get("variables")
    if not schema:
        return  # a pool that was made with no template gets that of its first worker
    known = schema.get("properties", {})
    pool, given = deployment.work_pool.name, deployment.work_pool.job_variables
    where = f"{deployment.name}: work_pool.job_variables"
    for name in given:
        if name.partition(".")[0] not in known:  # env.NAME sets one name of env
            near = difflib.get_close_matches(name, known, n=1)
            meant = f" (did you mean {near[0]}?)" if near else f"; known are {', '.join(known)}"
            raise RecipeError(
                f"{where}: the pool {pool}, of type {kind}, has no {name}{meant}",
                f"Mend it, or give the pool this package's template: {creation(pool, kind)} --overwrite",
            )
    defaults = {name: field["default"] for name, field in known.items() if field.get("default") is not None}
    plain = {name: value for name, value in given.items() if "." not in name}
    try:
        validate(defaults | plain, schema, raise_on_error=True)
    except ValidationError as error:
        said = str(error).removeprefix("Validation failed. ").removeprefix("Validation failed for ")
        raise RecipeError(
            f"{where}: {said}", f"See the pool's template: prefect work-pool inspect {pool}"
        ) from error
