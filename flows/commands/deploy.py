"""The body of `dpo deploy`: checks the deployment file, compares it with the server, and applies it."""

import json
from importlib import resources
from pathlib import Path
from typing import Any

import typer
from prefect import Flow
from prefect.exceptions import ParameterTypeError, SignatureMismatchError
from prefect.utilities.importtools import import_object

from dpo_core.data.files.read import check_source
from dpo_core.errors import DataError, RecipeError
from dpo_core.rewards.ensemble import parts
from flows.commands.cluster import read_cluster
from flows.commands.format import readable_time
from flows.process.prefect_server import server, server_address
from tasks.recipe.read import load_recipe, read_mapping, with_overrides
from tasks.recipe.recipe import Recipe
from tasks.scheduling.alerts import plan_alerts
from tasks.scheduling.automations import Step, read_automations
from tasks.scheduling.deployment_file import FILE_TAG, Deployment, PrefectFile, fill_in
from tasks.scheduling.deployments import (
    deployments_on_server,
    next_times,
    plan_deployment,
    plan_lost_triggers,
    plan_removal,
)
from tasks.scheduling.heartbeats import plan_heartbeats
from tasks.scheduling.work_pools import require_work_pool

Checked = list[tuple[Deployment, Any]]
"""The deployments of a file, each with its flow."""
_PACKAGES = ("flows", "tasks", "deploy", "expectations", "dpo_core")


def deploy_file(file: Path | None, notify: str | None, *, dry_run: bool, prune: bool, as_json: bool) -> None:
    """Check the file, print the changes, and apply them unless `dry_run` is set.

    Raises:
        RecipeError: the file is not valid, or the server cannot be used.
    """
    path = file or default_file()
    deployments = check_file(path)
    result: dict[str, Any] = {"file": str(path), "server": server_address(), "changes": [], "notes": []}
    result["next"] = fire_times(deployments)
    if server_address() is None and dry_run:
        result["notes"] = ["no Prefect server is configured, so nothing was compared (set PREFECT_API_URL)"]
    else:
        with server() as client:
            result |= reconcile(client, deployments, notify, dry_run=dry_run, prune=prune)
    result["applied"] = bool(result["changes"]) and not dry_run
    typer.echo(json.dumps(result, indent=1) if as_json else _as_text(result, dry_run))


def default_file() -> Path:
    """The deployment file in the current folder, else the one of the package."""
    here = Path("deploy/prefect.yaml")
    return here if here.is_file() else Path(str(resources.files("deploy"))) / "prefect.yaml"


def check_file(path: Path) -> Checked:
    """The deployments of a file, tagged with its path, and their flows, after all checks that need no server.

    Raises:
        RecipeError: the file is not valid, or a run of it could only fail.
    """
    marked = [
        deployment.model_copy(update={"tags": [*deployment.tags, f"{FILE_TAG}{path.absolute()}"]})
        for deployment in read_deployment_file(path).deployments
    ]
    return [(deployment, check_deployment(deployment)) for deployment in marked]


def read_deployment_file(path: Path) -> PrefectFile:
    """The contents of a file; `{{ $NAME }}` is replaced from the environment.

    Raises:
        RecipeError: the file is not valid. The message lists all unknown and wrong fields.
    """
    example = "Start from the deploy/prefect.yaml of the package"
    raw = read_mapping(path, str(path), "Set its path with --file", example)
    raw.pop("definitions", None)  # YAML anchors for the rest of the file
    return with_overrides(
        PrefectFile,
        fill_in(raw),
        [],
        f"{path} cannot be deployed",
        "Correct the file; nothing was sent to the server",
    )


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
    _check_working_folder(deployment)
    return flow


def _check_working_folder(deployment: Any) -> None:
    """Refuse a folder whose packages would replace this one: Prefect imports from `working_dir` first.

    Raises:
        RecipeError: the folder is on this machine and has a package of that name.
    """
    folder = deployment.work_pool.job_variables.get("working_dir")
    for name in _PACKAGES if isinstance(folder, str) else ():
        installed = Path(str(resources.files(name)))
        for path in (Path(folder) / name / "__init__.py", Path(folder) / f"{name}.py"):
            if path.exists() and path.resolve().parent != installed.resolve():
                raise RecipeError(
                    f"{deployment.name}: in working_dir {folder}, where its runs start, Python imports "
                    f"{path} in place of the installed package",
                    "Rename it, or set another working_dir",
                )


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
    _check_files(f"{where}: recipe {name}", recipe, data=not data_later and "data" not in parameters)
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
    rewards = [part.source.partition(":")[0] for part in parts(recipe.reward.source or "")]
    files = [
        *((field, path) for field, path in recipe.data.named_paths if data and _is_file(path)),
        *(("reward.source", reward) for reward in rewards if reward.endswith(".py")),
        ("sft.demonstrations", recipe.sft.demonstrations),
        ("diffusion_sft.captions", recipe.diffusion_sft and recipe.diffusion_sft.captions),
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


def fire_times(deployments: Checked) -> dict[str, list[str]]:
    """The next five times of each active schedule, in its own time zone."""
    times = {}
    for deployment, _ in deployments:
        for schedule in deployment.schedules:
            if schedule.active and not deployment.paused:
                coming = next_times(schedule.for_prefect().schedule)
                times[f"{deployment.name} {schedule.slug}"] = [time.isoformat() for time in coming]
    return times


def reconcile(
    client: Any, deployments: Checked, notify: str | None, *, dry_run: bool, prune: bool
) -> dict[str, list[Any]]:
    """Make the server match the file, after comparing everything.

    Returns:
        `changes`, each with its text, and `notes`.
    """
    for deployment, _ in deployments:
        require_work_pool(client, deployment)
    automations = read_automations(client)
    steps = [plan_deployment(client, automations, *checked) for checked in deployments]
    names = {deployment.name for deployment, _ in deployments}
    on_server = [
        deployed
        for flow_name in {flow.name for _, flow in deployments}
        for deployed in deployments_on_server(client, flow_name)
    ]
    extra = [deployed for deployed in on_server if deployed.name not in names]
    notes = []
    if prune:
        steps += [plan_removal(client, deployed) for deployed in extra]
    else:
        notes += [f"{one.name} is on the server but not in the file; --prune deletes it" for one in extra]
    steps += plan_lost_triggers(client, automations)
    alerts, alert_notes = plan_alerts(client, automations, notify)
    steps += [*alerts, plan_heartbeats(client, automations)]
    return {"changes": _make(steps, dry_run), "notes": notes + alert_notes}


def _make(steps: list[Step], dry_run: bool) -> list[dict[str, Any]]:
    """Apply the steps that change anything; returns their changes."""
    for step in steps:
        if step.changes and not dry_run:
            step.apply()
    return [{**change.model_dump(), "text": str(change)} for step in steps for change in step.changes]


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
