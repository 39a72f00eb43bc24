"""`dpo deploy`: make the Prefect server hold what the deploy file says, after showing what that changes."""

import json
import os
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import typer

from dpo_core.errors import RecipeError
from flows.process.prefect_server import server, server_address
from flows.process.trial_import import check_import

FileOption = Annotated[
    Path | None, typer.Option("--file", help="By default deploy/prefect.yaml here, or the package's own.")
]
NotifyOption = Annotated[
    str | None,
    typer.Option(
        envvar="DPO_NOTIFY_URL",
        show_default=False,
        help="Webhook or Apprise address to tell of runs that fail, crash, are late or refused. Better in "
        "the environment: others see options. Left out, alerts stay as they are; `none` removes them.",
    ),
]


def deploy(
    file: FileOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would change; change nothing.")
    ] = False,
    prune: Annotated[
        bool, typer.Option("--prune", help="Delete deployments that the file does not have.")
    ] = False,
    notify: NotifyOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")] = False,
) -> None:
    """Check the deployments, show what changes on the server and when they fire next, and apply it."""
    from deploy.prefect_file import read_prefect_file

    path = file or default_file()
    checked, raw = read_prefect_file(path, os.environ)
    _check_with_prefect(path, raw)
    flows = {deployment.name: check_deployment(deployment) for deployment in checked.deployments}
    told: dict[str, Any] = {"file": str(path), "server": server_address(), "changes": [], "notes": []}
    told["next"] = fire_times(checked.deployments)
    if server_address() is None and dry_run:
        told["notes"] = ["no Prefect server is named: compared with none (set PREFECT_API_URL)"]
    else:
        with server() as client:
            reconcile(client, checked.deployments, flows, notify, told, dry_run=dry_run, prune=prune)
    told["applied"] = bool(told["changes"]) and not dry_run
    typer.echo(json.dumps(told, indent=1) if as_json else _as_text(told, dry_run))


def default_file() -> Path:
    here = Path("deploy/prefect.yaml")
    return here if here.is_file() else Path(str(resources.files("deploy"))) / "prefect.yaml"


def _check_with_prefect(path: Path, raw: dict[str, Any]) -> None:
    """Prefect's own model of the file; it is private, and may be elsewhere in another version."""
    from pydantic import ValidationError

    try:
        from prefect.cli.deploy._models import PrefectYamlModel
    except ImportError:
        return
    try:
        PrefectYamlModel.model_validate(raw)
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"]))
        raise RecipeError(f"{path}: Prefect refuses {where}: {fault['msg']}", "Mend it") from error


def check_deployment(deployment: Any) -> Any:
    """The flow of a deployment, with every set of parameters that it can be run with checked.

    Raises:
        RecipeError: there is no such flow, it does not take the parameters, the recipe cannot be used, or the
            flow cannot be imported where its runs start.
    """
    from prefect import Flow
    from prefect.utilities.importtools import import_object

    where = deployment.name
    try:
        flow = import_object(deployment.entrypoint)
    except (ImportError, AttributeError) as error:
        raise RecipeError(
            f"{where}: entrypoint {deployment.entrypoint} cannot be imported ({error})",
            "Name a flow of an installed package: flows.deployed.deployed",
        ) from error
    if not isinstance(flow, Flow):
        raise RecipeError(f"{where}: entrypoint {deployment.entrypoint} is no flow", "Name a Prefect flow")
    given = deployment.parameters
    _check_parameters(flow, deployment, where, given)
    for schedule in deployment.schedules:
        _check_parameters(flow, deployment, f"{where} schedule {schedule.slug}", given | schedule.parameters)
    for trigger in deployment.triggers:
        # What the event brings is not known yet; a placeholder is a text.
        _check_parameters(flow, deployment, f"{where} trigger {trigger.name}", given | trigger.parameters)
    check_import(deployment)
    return flow


def _check_parameters(flow: Any, deployment: Any, where: str, parameters: dict[str, Any]) -> None:
    from prefect.exceptions import ParameterTypeError, SignatureMismatchError

    from tasks.recipe.read import load_recipe

    try:
        flow.validate_parameters(parameters)
    except (ParameterTypeError, SignatureMismatchError) as error:
        raise RecipeError(f"{where}: parameters: {' '.join(str(error).split())}", "Mend them") from error
    if not isinstance(parameters.get("recipe"), str):
        return
    name = parameters["recipe"]
    if name.endswith((".yaml", ".yml")) and not Path(name).expanduser().is_absolute():
        raise RecipeError(
            f"{where}: the recipe {name} is named from here, and workers run elsewhere", "Give its whole path"
        )
    try:
        recipe = load_recipe(name, parameters.get("overrides") or [])
    except RecipeError as error:
        raise RecipeError(f"{where}: {error.problem}", error.remedy) from error
    _check_cluster(where, parameters)
    rooted = Path(recipe.workspace).expanduser().is_absolute()
    if not rooted and "working_dir" not in deployment.work_pool.job_variables:
        raise RecipeError(
            f"{where}: the workspace {recipe.workspace} would be another, empty one for each run: a worker "
            "starts each in a folder of its own",
            "Set work_pool.job_variables.working_dir, or the override workspace=/a/whole/path",
        )


def _check_cluster(where: str, parameters: dict[str, Any]) -> None:
    from flows.cli.launch import read_cluster

    settings = parameters.get("settings")
    if settings is not None and not Path(settings).expanduser().is_absolute():
        raise RecipeError(
            f"{where}: the settings {settings} are named from here, and workers run elsewhere",
            "Give the whole path",
        )
    try:
        read_cluster(parameters.get("on", "local"), settings, [])
    except RecipeError as error:
        raise RecipeError(f"{where}: {error.problem}", error.remedy) from error


def fire_times(deployments: Any) -> dict[str, list[str]]:
    """The next five times of each active schedule, in its own time zone."""
    from tasks.scheduling.schedules import next_times, prefect_schedule

    return {
        f"{one.name} {schedule.slug}": [
            time.isoformat() for time in next_times(prefect_schedule(schedule, f"{one.name} {schedule.slug}"))
        ]
        for one in deployments
        for schedule in one.schedules
        if schedule.active and not one.paused
    }


def reconcile(
    client: Any,
    deployments: Any,
    flows: dict[str, Any],
    notify: str | None,
    told: dict[str, Any],
    *,
    dry_run: bool,
    prune: bool,
) -> None:
    """Everything is compared before anything is changed."""
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
    from tasks.scheduling.work_pools import require_work_pool

    planned = []
    for one in deployments:
        require_work_pool(client, one)
        flow = flows[one.name]
        planned.append(
            (one, flow, difference(one.name, wanted(one, flow), present(client, flow.name, one.name)))
        )
    changes = [change for _, _, some in planned for change in some]
    extra = [
        one
        for name in {flow.name for flow in flows.values()}
        for one in unmanaged_deployments(client, name, set(flows))
    ]
    if prune:
        changes += [Change(kind="removed", place=one.name) for one in extra]
    else:
        told["notes"] += [
            f"{one.name} is on the server, not in the file; --prune deletes it" for one in extra
        ]
    alerts, note = plan_alerts(client, notify)
    told["notes"] += note
    heartbeats = plan_heartbeats(client)
    lost = lost_triggers(client)
    gone = "of a deployment that is gone"
    changes += [Change(kind="removed", place=f"trigger {one.name} {gone}") for one in lost]
    everything = [*changes, *alerts, *heartbeats]
    told["changes"] = [{**change.model_dump(), "text": str(change)} for change in everything]
    if dry_run:
        return
    for one, flow, some in planned:
        if some:
            apply(client, one, flow)
    for one in extra if prune else []:
        remove(client, one.id)
    for automation in lost:
        client.delete_automation(automation.id)
    if alerts:
        apply_alerts(client, notify)
    if heartbeats:
        apply_heartbeats(client)


def _as_text(told: dict[str, Any], dry_run: bool) -> str:
    lines = [f"file    {told['file']}", f"server  {told['server'] or 'none'}"]
    lines += [change["text"] for change in told["changes"]]
    lines += [f"! {note}" for note in told["notes"]]
    for name, times in told["next"].items():
        lines.append(f"next    {name}: {', '.join(readable(time) for time in times)}")
    count = len(told["changes"])
    if told["server"] is None:
        ending = "the file is sound"
    elif not count:
        ending = "no difference, nothing changed"
    else:
        done = "nothing changed (--dry-run)" if dry_run else "applied"
        ending = f"{count} difference{'s' if count > 1 else ''}, {done}"
    return "\n".join([*lines, ending])


def readable(time: str) -> str:
    """A time of `fire_times` for people; the offset tells summer from winter."""
    return time.replace("T", " ").replace(":00+", "+", 1).replace(":00-", "-", 1)
