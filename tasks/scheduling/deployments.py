"""Deployments on a Prefect server: compare the server with the deployment file, and apply the file.

Prefect keeps a schedule that was removed from the file, and it continues to fire. Here the server is made to
match the file: a deployment that differs is rewritten with its schedules and triggers.
"""

import json
from collections.abc import Iterator
from typing import Any, Literal
from uuid import UUID

from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId, FlowFilter, FlowFilterName
from prefect.client.schemas.objects import ConcurrencyOptions
from prefect.events.schemas.deployment_triggers import DeploymentEventTrigger
from prefect.exceptions import ObjectNotFound
from prefect.utilities.callables import parameter_schema

from deploy.prefect_file import Deployment
from dpo_core.config import Config
from tasks.scheduling.schedules import comparable, prefect_schedule


class Change(Config):
    """One difference between the file and the server."""

    kind: Literal["added", "changed", "removed"]
    place: str
    """`nightly`, `nightly schedule every-night`, `nightly parameters`."""
    old: str | None = None
    new: str | None = None

    def __str__(self) -> str:
        sign = {"added": "+", "changed": "~", "removed": "-"}[self.kind]
        if self.kind == "changed":
            return f"{sign} {self.place}: {self.old} -> {self.new}"
        value = self.new if self.kind == "added" else self.old
        return f"{sign} {self.place}{f': {value}' if value else ''}"


Fields = dict[str, Any]
"""A deployment's fields as JSON; `schedules` and `triggers` by slug and by name."""


def wanted(deployment: Deployment, flow: Any) -> Fields:
    """The deployment's fields according to the file.

    Raises:
        RecipeError: a schedule or a trigger is invalid.
    """
    limit, pool = deployment.concurrency_limit, deployment.work_pool
    return {
        "entrypoint": deployment.entrypoint,
        "description": deployment.description,
        "version": deployment.version,
        "tags": sorted(deployment.tags),
        "parameters": deployment.parameters,
        "parameter_schema": parameter_schema(flow).model_dump_for_openapi(),
        "enforce_parameter_schema": deployment.enforce_parameter_schema,
        "paused": deployment.paused,
        "concurrency_limit": limit.limit,
        "collision_strategy": limit.collision_strategy,
        "grace_period_seconds": limit.grace_period_seconds,
        "work_pool": pool.name,
        "work_queue": pool.work_queue_name,
        "job_variables": pool.job_variables,
        "schedules": {
            schedule.slug: {
                **comparable(prefect_schedule(schedule, f"{deployment.name} schedule {schedule.slug}")),
                "active": schedule.active,
                "parameters": schedule.parameters,
            }
            for schedule in deployment.schedules
        },
        "triggers": {
            automation.name: automation_fields(automation) for automation in _automations(deployment, _NOBODY)
        },
    }


_NOBODY = "00000000-0000-0000-0000-000000000000"
MADE_BY = "Made by dpo deploy."
"""The end of every automation's description, which marks it: the server does not record who owns it."""


def _automations(deployment: Deployment, deployment_id: Any) -> Iterator[Any]:
    """The automations of the deployment's triggers."""
    for trigger in deployment.triggers:
        described = f"{trigger.description} {MADE_BY}".strip()
        event_trigger = DeploymentEventTrigger.model_validate(
            trigger.model_dump() | {"description": described}
        )
        event_trigger.set_deployment_id(UUID(str(deployment_id)))
        yield event_trigger.as_automation()


def automation_fields(automation: Any) -> Fields:
    """The fields by which automations are compared: all but their ids and that of their deployment."""
    trigger = automation.trigger.model_dump(mode="json", exclude={"id"})
    actions = [
        action.model_dump(mode="json", exclude={"deployment_id"}, exclude_none=True)
        for action in automation.actions
    ]
    # Sort the lists that Prefect makes from sets.
    trigger = {key: sorted(value) if isinstance(value, list) else value for key, value in trigger.items()}
    return {
        "description": automation.description,
        "enabled": automation.enabled,
        "trigger": trigger,
        "actions": actions,
    }


def present(client: Any, flow_name: str, name: str) -> Fields | None:
    """The deployment's fields on the server; None if it does not exist there."""
    try:
        deployed = client.read_deployment_by_name(f"{flow_name}/{name}")
    except ObjectNotFound:
        return None
    options, limit = deployed.concurrency_options, deployed.global_concurrency_limit
    return {
        "entrypoint": deployed.entrypoint,
        "description": deployed.description or "",
        "version": deployed.version,
        "tags": sorted(deployed.tags),
        "parameters": deployed.parameters,
        "parameter_schema": deployed.parameter_openapi_schema,
        "enforce_parameter_schema": deployed.enforce_parameter_schema,
        "paused": deployed.paused,
        "concurrency_limit": limit.limit if limit else None,
        "collision_strategy": options.collision_strategy.value if options else None,
        "grace_period_seconds": options.grace_period_seconds if options else None,
        "work_pool": deployed.work_pool_name,
        "work_queue": deployed.work_queue_name,
        "job_variables": deployed.job_variables,
        "schedules": {
            # A schedule without a slug was created by hand and is identified by its id.
            schedule.slug or f"(no slug) {schedule.id}": {
                **comparable(schedule.schedule),
                "active": schedule.active,
                "parameters": schedule.parameters,
            }
            for schedule in deployed.schedules
        },
        "triggers": {trigger.name: automation_fields(trigger) for trigger in _owned(client, deployed.id)},
    }


def _owned(client: Any, deployment_id: Any) -> list[Any]:
    related = client.read_resource_related_automations(f"prefect.deployment.{deployment_id}")
    return [automation for automation in related if automation.description.endswith(MADE_BY)]


def difference(name: str, new: Fields, old: Fields | None) -> list[Change]:
    """The changes that applying the file would make to one deployment."""
    changes = [] if old else [Change(kind="added", place=name)]
    for part in ("schedules", "triggers"):
        changes += _of_part(f"{name} {part.removesuffix('s')}", new[part], old[part] if old else {})
    if old:
        simple = new.keys() - {"schedules", "triggers", "parameter_schema"}
        changes += [
            Change(kind="changed", place=f"{name} {field}", old=_short(old[field]), new=_short(new[field]))
            for field in sorted(simple)
            if new[field] != old[field]
        ]
        if new["parameter_schema"] != old["parameter_schema"]:
            changes.append(Change(kind="changed", place=f"{name} form", old="another", new="of this version"))
    return changes


def _of_part(place: str, new: Fields, old: Fields) -> Iterator[Change]:
    for key in new.keys() - old.keys():
        yield Change(kind="added", place=f"{place} {key}", new=_sentence(new[key]))
    for key in old.keys() - new.keys():
        yield Change(kind="removed", place=f"{place} {key}", old=_sentence(old[key]))
    for key in new.keys() & old.keys():
        for field in sorted(new[key].keys() | old[key].keys()):
            before, after = old[key].get(field), new[key].get(field)
            if before != after:
                was, is_now = _short(before), _short(after)
                yield Change(kind="changed", place=f"{place} {key} {field}", old=was, new=is_now)


def _sentence(part: Fields) -> str:
    """One line that describes a schedule or a trigger."""
    if trigger := part.get("trigger"):
        resource = ", ".join(map(str, (trigger.get("match") or {}).values()))
        events = " or ".join(trigger.get("expect") or ["any"])
        return f"on event {events} for resource {resource or 'any'}"
    rule = next((f"{kind} {part[kind]}" for kind in ("cron", "interval", "rrule") if kind in part), "never")
    values = f", parameters {_short(part['parameters'])}" if part.get("parameters") else ""
    return f"{rule}, {part.get('timezone') or 'UTC'}{values}{'' if part.get('active') else ', paused'}"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return text if len(text) <= 200 else f"{text[:200]} …"


def apply(client: Any, deployment: Deployment, flow: Any) -> None:
    """Replace the server's deployment, schedules and triggers by those of the file.

    The server deletes the old schedules with the runs that they had scheduled, and schedules new ones.
    """
    limit, pool = deployment.concurrency_limit, deployment.work_pool
    schedules = [
        DeploymentScheduleCreate(
            schedule=prefect_schedule(schedule, f"{deployment.name} schedule {schedule.slug}"),
            active=schedule.active,
            parameters=schedule.parameters,
            slug=schedule.slug,
        )
        for schedule in deployment.schedules
    ]
    deployment_id = client.create_deployment(
        flow_id=client.create_flow_from_name(flow.name),
        name=deployment.name,
        version=deployment.version,
        schedules=schedules,
        concurrency_limit=limit.limit,
        concurrency_options=ConcurrencyOptions.model_validate(limit.model_dump(exclude={"limit"})),
        parameters=deployment.parameters,
        description=deployment.description,
        work_queue_name=pool.work_queue_name,
        work_pool_name=pool.name,
        tags=deployment.tags,
        entrypoint=deployment.entrypoint,
        pull_steps=[],
        paused=deployment.paused,
        parameter_openapi_schema=parameter_schema(flow).model_dump_for_openapi(),
        job_variables=pool.job_variables,
        enforce_parameter_schema=deployment.enforce_parameter_schema,
    )
    client.delete_resource_owned_automations(f"prefect.deployment.{deployment_id}")
    for automation in _automations(deployment, deployment_id):
        client.create_automation(automation)


def unmanaged_deployments(client: Any, flow_name: str, names: set[str]) -> list[Any]:
    """Deployments of the flow on the server that are not in the file."""
    of_flow = FlowFilter(name=FlowFilterName(any_=[flow_name]))
    deployed = client.read_deployments(flow_filter=of_flow)
    return [deployment for deployment in deployed if deployment.name not in names]


def remove(client: Any, deployment_id: Any) -> None:
    """Delete a deployment with its triggers, which Prefect would keep."""
    client.delete_resource_owned_automations(f"prefect.deployment.{deployment_id}")
    client.delete_deployment(deployment_id)


def lost_triggers(client: Any) -> list[Any]:
    """Automations of `dpo deploy` whose deployment no longer exists, such as one deleted in the UI."""
    automations = client.read_automations()
    ours = [automation for automation in automations if automation.description.endswith(MADE_BY)]
    runs = [
        {number for action in automation.actions if (number := getattr(action, "deployment_id", None))}
        for automation in ours
    ]
    named = sorted({number for numbers in runs for number in numbers})
    if not named:
        return []
    deployments = client.read_deployments(
        deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=named))
    )
    existing = {deployment.id for deployment in deployments}
    return [
        automation
        for automation, numbers in zip(ours, runs, strict=True)
        if numbers and not numbers & existing
    ]
