"""The body of `dpo deploy`: checks the deployment file, compares it with the server, and applies it."""

import json
import os
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Any

import typer
from prefect import Flow
from prefect.exceptions import ParameterTypeError, SignatureMismatchError
from prefect.utilities.importtools import import_object
from pydantic import ValidationError

from deploy.prefect_file import read_prefect_file
from dpo_core.data.files.read import check_source
from dpo_core.errors import DataError, RecipeError
from flows.commands.cluster import read_cluster
from flows.commands.format import readable_time
from flows.process.prefect_server import server, server_address
from flows.process.trial_import import check_import
from tasks.recipe.read import load_recipe
from tasks.recipe.recipe import Recipe
from tasks.scheduling.alerts import apply_alerts, plan_alerts
from tasks.scheduling.deployments import (
    Change,
    apply,
    difference,
    lost_triggers,
    present,
    remove,
    unmanaged_deployments,
    wanted,
)
from tasks.scheduling.heartbeats import apply_heartbeats, plan_heartbeats
from tasks.scheduling.schedules import next_times, prefect_schedule
from tasks.scheduling.work_pools import require_work_pool

PrefectYamlModel: Any = None
with suppress(ImportError):  # it is private, and other versions of Prefect may not have it
    from prefect.cli.deploy._models import PrefectYamlModel


def deploy_file(file: Path | None, notify: str | None, *, dry_run: bool, prune: bool, as_json: bool) -> None:
    """Check the file, print the changes, and apply them unless `dry_run` is set.

    Raises:
        RecipeError: the file is not valid, or the server cannot be used.
    """
    path = file or default_file()
    checked, raw = read_prefect_file(path, os.environ)
    check_with_prefect(path, raw)
    flows = {deployment.name: check_deployment(deployment) for deployment in checked.deployments}
    result: dict[str, Any] = {"file": str(path), "server": server_address(), "changes": [], "notes": []}
    result["next"] = fire_times(checked.deployments)
    if server_address() is None and dry_run:
        result["notes"] = ["no Prefect server is configured, so nothing was compared (set PREFECT_API_URL)"]
    else:
        with server() as client:
            result |= reconcile(client, checked.deployments, flows, notify, dry_run=dry_run, prune=prune)
    result["applied"] = bool(result["changes"]) and not dry_run
    typer.echo(json.dumps(result, indent=1) if as_json else _as_text(result, dry_run))


def default_file() -> Path:
    """The deployment file in the current folder, else the one of the package."""
    here = Path("deploy/prefect.yaml")
    return here if here.is_file() else Path(str(resources.files("deploy"))) / "prefect.yaml"


def check_with_prefect(path: Path, raw: dict[str, Any]) -> None:
    """Validate the file with Prefect's own model of it.

    Raises:
        RecipeError: Prefect would refuse the file.
    """
    if PrefectYamlModel is None:
        return
    try:
        PrefectYamlModel.model_validate(raw)
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"]))
        raise RecipeError(
            f"{path}: Prefect refuses {where}: {fault['msg']}", f"Correct {where} in this file"
        ) from error


def check_deployment(deployment: Any) -> Any:
    """Check a deployment with all parameters that its schedules and triggers set; returns its flow.

    Raises:
        RecipeError: the flow cannot be imported where its runs start, or the parameters or recipe are not
            valid.
    """
    where = deployment.name
    try:
        flow = import_object(deployment.entrypoint)
    except (ImportError, AttributeError) as error:
        raise RecipeError(
            f"{where}: entrypoint {deployment.entrypoint} cannot be imported ({error})",
            "Name a flow of an installed package: flows.deployed.deployed",
        ) from error
    if not isinstance(flow, Flow):
        raise RecipeError(f"{where}: entrypoint {deployment.entrypoint} is not a flow", "Name a Prefect flow")
    common = deployment.parameters
    _check_parameters(flow, deployment, where, common)
    for schedule in deployment.schedules:
        _check_parameters(flow, deployment, f"{where} schedule {schedule.slug}", common | schedule.parameters)
    for trigger in deployment.triggers:
        # Values from the event are not known yet; their placeholders are strings.
        _check_parameters(flow, deployment, f"{where} trigger {trigger.name}", common | trigger.parameters)
    check_import(deployment)
    return flow


def _check_parameters(flow: Any, deployment: Any, where: str, parameters: dict[str, Any]) -> None:
    try:
        flow.validate_parameters(parameters)
    except (ParameterTypeError, SignatureMismatchError) as error:
        raise RecipeError(
            f"{where}: parameters: {' '.join(str(error).split())}",
            f"Correct the parameters of {where} in the deployment file",
        ) from error
    if not isinstance(parameters.get("recipe"), str):
        return
    name = parameters["recipe"]
    if name.endswith((".yaml", ".yml")) and not Path(name).expanduser().is_absolute():
        raise RecipeError(
            f"{where}: the recipe {name} is a relative path, and workers run in other folders",
            "Use an absolute path",
        )
    try:
        recipe = load_recipe(name, parameters.get("overrides") or [])
    except RecipeError as error:
        raise RecipeError(f"{where}: {error.problem}", error.remedy) from error
    _check_cluster(where, parameters)
    started_by = [*deployment.schedules, *deployment.triggers]
    data_later = where == deployment.name and any("data" in one.parameters for one in started_by)
    _check_files(where, recipe, data=not data_later and "data" not in parameters)
    absolute = Path(recipe.workspace).expanduser().is_absolute()
    if not absolute and "working_dir" not in deployment.work_pool.job_variables:
        raise RecipeError(
            f"{where}: the workspace {recipe.workspace} is a relative path, and a worker starts each run in "
            "a new folder, so no run would find the results of earlier ones",
            "Set work_pool.job_variables.working_dir, or the override workspace=/absolute/path",
        )


def _check_cluster(where: str, parameters: dict[str, Any]) -> None:
    settings = parameters.get("settings")
    if settings is not None and not Path(settings).expanduser().is_absolute():
        raise RecipeError(
            f"{where}: the settings file {settings} is a relative path, and workers run in other folders",
            "Use an absolute path",
        )
    try:
        read_cluster(parameters.get("on", "local"), settings, [])
    except RecipeError as error:
        raise RecipeError(f"{where}: {error.problem}", error.remedy) from error


def _check_files(where: str, recipe: Recipe, *, data: bool) -> None:
    """Refuse relative paths of the recipe's files, of its data only if the run reads them (`data`)."""
    reward = (recipe.reward.source or "").partition(":")[0]
    files = [
        *(("data", path) for path in recipe.data.paths if data and _is_file(path)),
        ("reward.source", reward if reward.endswith(".py") else None),
        ("sft.demonstrations", recipe.sft.demonstrations),
        ("gate.baseline", recipe.gate.baseline),
        ("model.chat_template", recipe.model.chat_template),
    ]
    for field, path in files:
        if path and not Path(path).expanduser().is_absolute():
            raise RecipeError(
                f"{where}: {field}: {path} is a relative path, and workers run in other folders",
                "Use an absolute path",
            )


def _is_file(path: str) -> bool:
    """False for the name of a data set on the hub."""
    try:
        check_source(path)
    except DataError:
        return True
    return Path(path).expanduser().exists()


def fire_times(deployments: Any) -> dict[str, list[str]]:
    """The next five times of each active schedule, in its own time zone."""
    times = {}
    for deployment in deployments:
        for schedule in deployment.schedules:
            if schedule.active and not deployment.paused:
                name = f"{deployment.name} {schedule.slug}"
                times[name] = [time.isoformat() for time in next_times(prefect_schedule(schedule, name))]
    return times


def reconcile(
    client: Any,
    deployments: Any,
    flows: dict[str, Any],
    notify: str | None,
    *,
    dry_run: bool,
    prune: bool,
) -> dict[str, list[Any]]:
    """Make the server match the file, after comparing everything.

    Returns:
        `changes`, each with its text, and `notes`.
    """
    planned = []
    for deployment in deployments:
        require_work_pool(client, deployment)
        flow = flows[deployment.name]
        on_server = present(client, flow.name, deployment.name)
        planned.append((deployment, flow, difference(deployment.name, wanted(deployment, flow), on_server)))
    changes = [change for _, _, differences in planned for change in differences]
    extra = [
        deployment
        for name in {flow.name for flow in flows.values()}
        for deployment in unmanaged_deployments(client, name, set(flows))
    ]
    notes = []
    if prune:
        changes += [Change(kind="removed", place=deployment.name) for deployment in extra]
    else:
        notes += [f"{one.name} is on the server but not in the file; --prune deletes it" for one in extra]
    alerts, alert_notes = plan_alerts(client, notify)
    heartbeats = plan_heartbeats(client)
    lost = lost_triggers(client)
    changes += [
        Change(kind="removed", place=f"trigger {automation.name} of a deleted deployment")
        for automation in lost
    ]
    if not dry_run:
        for deployment, flow, differences in planned:
            if differences:
                apply(client, deployment, flow)
        for deployment in extra if prune else []:
            remove(client, deployment.id)
        for automation in lost:
            client.delete_automation(automation.id)
        if alerts:
            apply_alerts(client, notify)
        if heartbeats:
            apply_heartbeats(client)
    listed = [{**change.model_dump(), "text": str(change)} for change in [*changes, *alerts, *heartbeats]]
    return {"changes": listed, "notes": notes + alert_notes}


def _as_text(result: dict[str, Any], dry_run: bool) -> str:
    lines = [f"file    {result['file']}", f"server  {result['server'] or 'none'}"]
    lines += [change["text"] for change in result["changes"]]
    lines += [f"! {note}" for note in result["notes"]]
    for name, times in result["next"].items():
        lines.append(f"next    {name}: {', '.join(readable_time(time) for time in times)}")
    count = len(result["changes"])
    if result["server"] is None:
        ending = "the file is valid"
    elif not count:
        ending = "no difference, nothing changed"
    else:
        done = "nothing changed (--dry-run)" if dry_run else "applied"
        ending = f"{count} difference{'s' if count > 1 else ''}, {done}"
    return "\n".join([*lines, ending])
