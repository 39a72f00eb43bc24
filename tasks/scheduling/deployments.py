"""Deployments on a Prefect server: the steps that make them match the deployment file.

Prefect keeps a schedule that was removed from the file, and it continues to fire; here it is removed.
"""

import asyncio
import json
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4
from zoneinfo import ZoneInfo

from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    FlowFilter,
    FlowFilterName,
)
from prefect.deployments.runner import DeploymentApplyError, RunnerDeployment
from prefect.exceptions import ObjectNotFound
from prefect.server.schemas.schedules import SCHEDULE_TYPES
from prefect.types.entrypoint import EntrypointType
from prefect.utilities.callables import parameter_schema
from pydantic import TypeAdapter

from dpo_core.errors import RecipeError
from tasks.scheduling.automations import Change, Step, automation_fields, differences, removal
from tasks.scheduling.deployment_file import FILE_TAG, MADE_BY, Deployment

Fields = dict[str, Any]
# Not the version: without one in the file Prefect takes that of the code.
_COMPARED = {
    "concurrency_limit",
    "concurrency_options",
    "description",
    "enforce_parameter_schema",
    "entrypoint",
    "job_variables",
    "parameters",
    "paused",
    "tags",
    "work_pool_name",
    "work_queue_name",
}


def for_prefect(deployment: Deployment, flow: Any) -> RunnerDeployment:
    """Prefect's form of a deployment of the file."""
    pool = deployment.work_pool
    made: RunnerDeployment = flow.to_deployment(
        deployment.name,
        paused=deployment.paused,
        schedules=[schedule.for_prefect() for schedule in deployment.schedules],
        concurrency_limit=deployment.concurrency_limit,
        parameters=deployment.parameters,
        triggers=deployment.triggers,
        description=deployment.description,
        tags=deployment.tags,
        version=deployment.version,
        enforce_parameter_schema=deployment.enforce_parameter_schema,
        work_pool_name=pool.name,
        work_queue_name=pool.work_queue_name,
        job_variables=pool.job_variables,
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
    return made


def plan_deployment(client: Any, automations: list[Any], deployment: Deployment, flow: Any) -> Step:
    """The step that makes the server's deployment that of the file.

    Args:
        automations: all automations of the server.
    """
    made = for_prefect(deployment, flow)
    try:
        deployed = client.read_deployment_by_name(made.full_name)
    except ObjectNotFound:
        deployed = None
    new = _wanted(made, flow, deployed.id if deployed else uuid4())
    old = _present(deployed, automations) if deployed else {}
    stale = [s for s in (deployed.schedules if deployed else []) if _schedule_place(s) not in new]

    def apply() -> None:
        try:
            made.apply()
        except DeploymentApplyError as error:
            raise RecipeError(
                f"the server refused the deployment {deployment.name}: {error}", "Correct the deployment file"
            ) from error
        for schedule in stale:
            client.delete_deployment_schedule(deployed.id, schedule.id)

    return Step(_changes(deployment.name, new, old), apply)


def _wanted(made: RunnerDeployment, flow: Any, number: UUID) -> dict[str, Fields]:
    """The deployment, its schedules and its triggers, by their place in a list of changes."""
    fields = made.model_dump(mode="json", include=_COMPARED)
    fields |= {"tags": sorted(made.tags), "form": parameter_schema(flow).model_dump(exclude_unset=True)}
    for trigger in made.triggers:
        trigger.set_deployment_id(number)
    triggers = [trigger.as_automation() for trigger in made.triggers]
    return _parts(fields, made.schedules or [], triggers)


def _present(deployed: Any, automations: list[Any]) -> dict[str, Fields]:
    """The same of a deployment on the server."""
    fields = deployed.model_dump(mode="json", include=_COMPARED)
    limit = deployed.global_concurrency_limit
    fields |= {"tags": sorted(deployed.tags), "form": deployed.parameter_openapi_schema}
    fields["concurrency_limit"] = limit.limit if limit else None
    triggers = [one for one in automations if is_made_here(one) and deployed.id in deployments_of(one)]
    return _parts(fields, deployed.schedules, triggers)


def _parts(fields: Fields, schedules: list[Any], triggers: list[Any]) -> dict[str, Fields]:
    parts = {"": json.loads(json.dumps(fields))}
    for schedule in schedules:
        rule = schedule.schedule.model_dump(mode="json", exclude_none=True)
        if anchor := getattr(schedule.schedule, "anchor_date", None):
            rule["anchor_date"] = anchor.astimezone(UTC).isoformat()
        parts[_schedule_place(schedule)] = rule | {
            "active": schedule.active,
            "parameters": schedule.parameters,
        }
    return parts | {f" trigger {trigger.name}": automation_fields(trigger) for trigger in triggers}


def _schedule_place(schedule: Any) -> str:
    # A schedule without a slug was created by hand and is identified by its id.
    return f" schedule {schedule.slug or schedule.id}"


def _changes(name: str, new: dict[str, Fields], old: dict[str, Fields]) -> list[Change]:
    changes = [Change(kind="added", place=f"{name}{part}") for part in new if part not in old]
    changes += [Change(kind="removed", place=f"{name}{part}") for part in old if part not in new]
    for part in [part for part in new if part in old]:
        changes += differences(f"{name}{part}", new[part], old[part])
    return changes


def is_made_here(automation: Any) -> bool:
    """Whether `dpo deploy` created the automation."""
    return bool(automation.description.endswith(MADE_BY))


def deployments_of(automation: Any) -> set[Any]:
    """The ids of the deployments that an automation runs."""
    return {number for action in automation.actions if (number := getattr(action, "deployment_id", None))}


def deployments_on_server(client: Any, flow_name: str) -> list[Any]:
    """The server's deployments of a flow."""
    found: list[Any] = client.read_deployments(flow_filter=FlowFilter(name=FlowFilterName(any_=[flow_name])))
    return found


def deployed_files(deployments: Iterable[Any]) -> list[Path]:
    """The files that the server's deployments came from, by their tags."""
    tags = {tag for deployed in deployments for tag in deployed.tags if tag.startswith(FILE_TAG)}
    return [Path(tag.removeprefix(FILE_TAG)) for tag in sorted(tags)]


def plan_removal(client: Any, deployed: Any) -> Step:
    """Delete a deployment with its triggers, which Prefect would keep."""

    def apply() -> None:
        client.delete_resource_owned_automations(f"prefect.deployment.{deployed.id}")
        client.delete_deployment(deployed.id)

    return Step([Change(kind="removed", place=deployed.name)], apply)


def plan_lost_triggers(client: Any, automations: list[Any]) -> list[Step]:
    """Delete automations of `dpo deploy` whose deployment no longer exists, such as one deleted in the UI."""
    return [
        removal(client, one, f"trigger {one.name} of a deleted deployment")
        for one in automations
        if is_made_here(one) and (used := deployments_of(one)) and not _existing(client, used)
    ]


def _existing(client: Any, numbers: set[Any]) -> list[Any]:
    """The deployments of these ids, of any flow: those of other files are not in this one."""
    found: list[Any] = client.read_deployments(
        deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=sorted(numbers)))
    )
    return found


def next_times(schedule: Any, count: int = 5, start: datetime | None = None) -> list[datetime]:
    """The next times at which a schedule of Prefect's client fires, in its time zone."""
    kind: Any = TypeAdapter(SCHEDULE_TYPES)
    times = asyncio.run(
        kind.validate_python(schedule.model_dump()).get_dates(n=count, start=start or datetime.now(UTC))
    )
    zone = ZoneInfo(schedule.timezone or "UTC")
    return [datetime.fromtimestamp(time.timestamp(), zone) for time in times]
