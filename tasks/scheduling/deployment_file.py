"""The contents of `prefect.yaml`, strictly: Prefect itself silently drops unknown keys of a deployment."""

import os
from collections import Counter
from datetime import datetime, timedelta
from typing import Any, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.objects import ConcurrencyLimitConfig
from prefect.events import DeploymentEventTrigger
from prefect.schedules import Schedule
from prefect.utilities.templating import PlaceholderType, apply_values, find_placeholders
from pydantic import Field, ValidationError, model_validator

from dpo_core.config import Config
from dpo_core.errors import RecipeError
from dpo_core.redaction import SECRET_NAME

MADE_BY = "Made by dpo deploy."
"""The end of every automation's description, which marks it: the server does not show who owns it."""

FILE_TAG = "file:"
"""Begins the tag of a deployment that names its file, so that no other file is compared with the server."""


class DeploymentSchedule(Config):
    """When a deployment runs: exactly one of `cron`, `interval` and `rrule`."""

    slug: str = Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")
    """Identity of the schedule; another slug is another schedule."""
    timezone: str
    """IANA time zone of its times."""
    active: bool
    """Whether it fires."""
    cron: str | None = None
    interval: timedelta | None = Field(None, gt=timedelta(0))
    """Seconds, or ISO 8601 (PT6H)."""
    rrule: str | None = None
    """RFC 5545 with DTSTART in local time; without DTSTART the times would change with each deployment."""
    anchor_date: datetime | None = None
    """Start of the intervals; without it they would start at the time of deployment."""
    day_or: bool = True
    """Whether cron's day of the month and day of the week are alternatives."""
    parameters: dict[str, Any] = Field(default_factory=dict)
    """Override those of the deployment."""

    @model_validator(mode="after")
    def _check(self) -> "DeploymentSchedule":
        if not (self.cron or self.interval or self.rrule):
            raise ValueError("set one of cron, interval and rrule")
        if (self.interval is None) != (self.anchor_date is None):
            raise ValueError("interval and anchor_date must be set together")
        if self.rrule is not None and "DTSTART" not in self.rrule:
            raise ValueError("an rrule needs a DTSTART, such as DTSTART:20260101T040000")
        try:
            self.for_prefect()
        except ValidationError as error:
            raise ValueError(error.errors()[0]["msg"].removeprefix("Value error, ")) from error
        except (ZoneInfoNotFoundError, OSError) as error:
            raise ValueError(f"{self.timezone} is not the name of a time zone") from error
        if self.interval and self.interval >= timedelta(days=1) and _has_daylight_saving(self.timezone):
            # Prefect counts seconds from the anchor, so the hour of the day changes with the clocks.
            raise ValueError(
                f"an interval of days would shift by an hour when the clocks of {self.timezone} change: use "
                "cron, or timezone: UTC"
            )
        return self

    def for_prefect(self) -> DeploymentScheduleCreate:
        """Prefect's form of the schedule.

        Raises:
            ValueError: Prefect cannot read its rule or time zone.
            ZoneInfoNotFoundError: there is no such time zone.
        """
        fields = self.model_dump(exclude_none=True)
        if self.anchor_date and self.anchor_date.tzinfo is None:
            fields["anchor_date"] = self.anchor_date.replace(tzinfo=ZoneInfo(self.timezone))
        return DeploymentScheduleCreate.from_schedule(Schedule(**fields))


class Trigger(DeploymentEventTrigger, extra="forbid"):
    """Which event starts the deployment, and the parameters of that run.

    Prefect fills in `{{ event.payload.x }}` from the event.
    """

    type: Literal["event"]
    name: str = Field(min_length=1)
    """Name of the automation that Prefect creates."""
    expect: set[str] = Field(min_length=1)
    """Names of events; a `*` at the end matches any ending."""
    parameters: dict[str, Any] = Field(default_factory=dict)
    """Override those of the deployment."""

    @model_validator(mode="after")
    def _mark(self) -> "Trigger":
        self.description = f"{self.description.removesuffix(MADE_BY).strip()} {MADE_BY}".strip()
        return self


class Limit(ConcurrencyLimitConfig, extra="forbid"):
    """How many runs of the deployment may run at the same time, and what happens to more."""

    limit: int = Field(ge=1)
    grace_period_seconds: int = Field(default=600, ge=60, le=86400)
    """Seconds after which the slot of a run that never started is free again."""


class WorkPool(Config):
    """The work pool whose workers run the deployment."""

    name: str = Field(min_length=1)
    work_queue_name: str = "default"
    job_variables: dict[str, Any] = Field(default_factory=dict)
    """Fields of the pool's template; for a process: `working_dir`, `env`."""


class Deployment(Config):
    """A flow with its parameters, work pool, schedules and triggers."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str = ""
    version: str | None = None
    tags: list[str] = Field(default_factory=list)
    entrypoint: str = Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)+$")
    """Dotted path of a flow in an installed package, because the worker's folder contains no code."""
    parameters: dict[str, Any] = Field(default_factory=dict)
    enforce_parameter_schema: bool = True
    paused: bool = False
    concurrency_limit: Limit = Limit(limit=1)
    work_pool: WorkPool
    schedules: list[DeploymentSchedule] = Field(default_factory=list)
    triggers: list[Trigger] = Field(default_factory=list)

    @model_validator(mode="after")
    def _unique_slugs(self) -> "Deployment":
        _require_unique("slug", [schedule.slug for schedule in self.schedules])
        return self


class PrefectFile(Config):
    """The contents of `prefect.yaml`."""

    prefect_version: str | None = Field(None, alias="prefect-version")
    name: str | None = None
    pull: list[dict[str, Any]] = Field(default_factory=list, max_length=0)
    """Must be empty, because the flow comes with the package."""
    deployments: list[Deployment] = Field(min_length=1)

    @model_validator(mode="after")
    def _unique_names(self) -> "PrefectFile":
        _require_unique("deployment", [deployment.name for deployment in self.deployments])
        triggers = [trigger.name for deployment in self.deployments for trigger in deployment.triggers]
        _require_unique("trigger", triggers)
        return self


def _has_daylight_saving(zone: str) -> bool:
    offsets = {datetime(2026, month, 1, tzinfo=ZoneInfo(zone)).utcoffset() for month in range(1, 13)}
    return len(offsets) > 1


def _require_unique(kind: str, names: list[str]) -> None:
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ValueError(f"the {kind} {repeated[0]} appears twice; rename one")


def fill_in(value: Any, place: str = "") -> Any:
    """The value with `{{ $NAME }}` replaced from the environment, as `prefect deploy` does.

    The parameters of triggers are left to Prefect, and so are its blocks and variables.

    Raises:
        RecipeError: a variable is not set or holds a secret, or a placeholder has another form.
    """
    if isinstance(value, dict):
        return {
            key: inner if key == "triggers" else fill_in(inner, f"{place}.{key}")
            for key, inner in value.items()
        }
    if isinstance(value, list):
        return [fill_in(inner, f"{place}.{index}") for index, inner in enumerate(value)]
    if not isinstance(value, str):
        return value
    for placeholder in find_placeholders(value):
        _check_placeholder(placeholder, place.removeprefix("."))
    return apply_values(value, {})


def _check_placeholder(placeholder: Any, place: str) -> None:
    if placeholder.type in (PlaceholderType.BLOCK_DOCUMENT, PlaceholderType.VARIABLE):
        return
    name, shown = placeholder.name.removeprefix("$"), f"{place}: {placeholder.full_match}"
    if placeholder.type is PlaceholderType.STANDARD:
        raise RecipeError(f"{shown} is not of the form {{{{ $NAME }}}}", "Name an environment variable")
    if SECRET_NAME.search(name):
        raise RecipeError(
            f"{shown} looks like a secret, and the server shows the file's values",
            "Store it in a block, and write {{ prefect.blocks.secret.NAME }} in job_variables",
        )
    if name not in os.environ:
        raise RecipeError(f"{shown} is not set in the environment", f"export {name}=…")
