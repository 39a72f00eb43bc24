"""Reads and validates `prefect.yaml` strictly: Prefect itself silently drops unknown keys of a deployment."""

import difflib
import re
import typing
from collections import Counter
from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal
from zoneinfo import ZoneInfo, available_timezones

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from dpo_core.config import Config
from dpo_core.errors import RecipeError
from dpo_core.redaction import SECRET_NAME
from dpo_core.system import read_small
from dpo_core.yaml import read_yaml

Place = tuple[int | str, ...]
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
_PLACEHOLDER = re.compile(r"\{\{\s*(.*?)\s*\}\}")


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

    @field_validator("timezone")
    @classmethod
    def _known(cls, zone: str) -> str:
        if zone not in available_timezones():
            near = difflib.get_close_matches(zone, available_timezones(), n=1, cutoff=0.7)
            hint = f" (did you mean {near[0]}?)" if near else "; use for example UTC or Europe/Berlin"
            raise ValueError(f"this is not an IANA time zone{hint}")
        return zone

    @model_validator(mode="after")
    def _one_kind(self) -> "DeploymentSchedule":
        kinds = [name for name in ("cron", "interval", "rrule") if getattr(self, name) is not None]
        if len(kinds) != 1:
            raise ValueError(f"set exactly one of cron, interval, rrule (set: {', '.join(kinds) or 'none'})")
        if (self.interval is None) != (self.anchor_date is None):
            raise ValueError("interval and anchor_date must be set together")
        if self.interval and self.interval >= timedelta(days=1) and _has_daylight_saving(self.timezone):
            # Prefect counts seconds from the anchor, so the hour of the day changes with the clocks.
            raise ValueError(
                f"an interval of days would shift by an hour when the clocks of {self.timezone} change: use "
                "cron, or timezone: UTC"
            )
        if self.rrule is not None and "DTSTART" not in self.rrule:
            raise ValueError("an rrule needs a DTSTART, such as DTSTART:20260101T040000")
        if self.cron is None and not self.day_or:
            raise ValueError("day_or has no effect without cron; remove it")
        return self


class Trigger(Config):
    """Which event starts the deployment, and the parameters of that run."""

    type: Literal["event"]
    name: str = Field(min_length=1)
    """Name of the automation that Prefect creates."""
    description: str = ""
    enabled: bool = True
    expect: list[str] = Field(min_length=1)
    """Names of events; a `*` at the end matches any ending."""
    match: dict[str, str | list[str]] = Field(default_factory=dict)
    """Labels of the event's resource."""
    match_related: dict[str, str | list[str]] = Field(default_factory=dict)
    """Labels of a resource that the event is related to."""
    parameters: dict[str, Any] = Field(default_factory=dict)
    """Override those of the deployment; Prefect fills in `{{ event.payload.x }}` from the event."""
    schedule_after: timedelta = Field(timedelta(0), ge=timedelta(0))
    """Delay of the run after the event."""


class Limit(Config):
    """How many runs of the deployment may run at the same time, and what happens to more."""

    limit: int = Field(ge=1)
    collision_strategy: Literal["ENQUEUE", "CANCEL_NEW"] = "ENQUEUE"
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

    name: str = Field(pattern=_NAME)
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
    def _unique_names(self) -> "Deployment":
        _require_unique("slug", [schedule.slug for schedule in self.schedules])
        _require_unique("trigger", [trigger.name for trigger in self.triggers])
        return self


class PrefectFile(Config):
    """The contents of `prefect.yaml`."""

    prefect_version: str | None = Field(None, alias="prefect-version")
    name: str | None = None
    pull: list[dict[str, Any]] = Field(default_factory=list, max_length=0)
    """Must be empty, because the flow comes with the package."""
    definitions: Any = None
    """YAML anchors for the rest of the file."""
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


def read_prefect_file(path: Path, environment: Mapping[str, str]) -> tuple[PrefectFile, dict[str, Any]]:
    """The file and its plain mapping; `{{ $NAME }}` is replaced from the environment.

    Raises:
        RecipeError: the file is not valid. The message lists all faults with their places and lines.
    """
    try:
        text = read_small(path)
        raw = read_yaml(text)
    except OSError as error:
        raise RecipeError(f"{path} cannot be read ({error.strerror})", "Set its path with --file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = " ".join(str(error).split())
        raise RecipeError(f"{path} is not valid YAML: {where}", "Correct that line") from error
    if not isinstance(raw, dict):
        raise RecipeError(f"{path} is not a mapping", "Start from the deploy/prefect.yaml of the package")
    faults: list[tuple[Place, str]] = []
    definitions = raw.pop("definitions", None)  # aliases repeat its used parts in the rest of the file
    filled = _filled(raw, environment, (), faults)
    if not faults:
        try:
            return PrefectFile.model_validate(filled | {"definitions": definitions}), filled
        except ValidationError as error:
            faults = [(fault["loc"], _message(fault)) for fault in error.errors()]
    messages: dict[tuple[str, str], str] = {}  # a fault that aliases repeat is listed once
    for place, message in faults:
        line = _line(text, place)
        messages.setdefault((line or _written(place), message), f"{_written(place)}{line}: {message}")
    raise RecipeError(
        f"{path} cannot be deployed: {'; '.join(messages.values())}",
        "Correct the file; nothing was sent to the server",
    )


def _filled(value: Any, environment: Mapping[str, str], place: Place, faults: list[tuple[Place, str]]) -> Any:
    """The value with `{{ $NAME }}` replaced. Prefect fills in the parameters of triggers, and blocks and
    variables in job variables."""
    if isinstance(value, dict):
        return {key: _filled(inner, environment, (*place, key), faults) for key, inner in value.items()}
    if isinstance(value, list):
        return [_filled(inner, environment, (*place, index), faults) for index, inner in enumerate(value)]
    if not isinstance(value, str) or place[2:3] == ("triggers",):
        return value

    def replaced(match: re.Match[str]) -> str:
        name = match[1]
        if name.startswith(_OF_PREFECT) and place[2:4] == ("work_pool", "job_variables"):
            return match[0]
        if name.startswith("$") and SECRET_NAME.search(name):
            faults.append((place, f"{{{{ {name} }}}} {_SECRET}"))
            return ""
        if name.startswith("$") and name[1:] in environment:
            return environment[name[1:]]
        if name.startswith("$"):
            problem = f"is not set in the environment (export {name[1:]}=…)"
        else:
            problem = "is not of the form {{ $NAME }}"
        faults.append((place, f"{{{{ {name} }}}} {problem}"))
        return ""

    return _PLACEHOLDER.sub(replaced, value)


_OF_PREFECT = ("prefect.blocks.", "prefect.variables.")
_SECRET = (
    "looks like a secret, and the server shows the file's values; store it in a block, and write "
    "{{ prefect.blocks.secret.NAME }} in job_variables"
)


def _message(fault: Any) -> str:
    if fault["type"] == "extra_forbidden":
        return f"there is no such key{_hint(fault['loc'])}"
    value = "" if isinstance(fault["input"], dict | list) else f" (the value is {fault['input']!r})"
    return f"{fault['msg'].removeprefix('Value error, ')}{value}"


def _hint(place: Place) -> str:
    """The valid key nearest to an unknown one, or all valid keys."""
    model: Any = PrefectFile
    for part in place[:-1]:
        if not isinstance(part, int):
            model = _model_in(model.model_fields[part].annotation)
    near = difflib.get_close_matches(str(place[-1]), model.model_fields, n=1)
    return f" (did you mean {near[0]}?)" if near else f"; use one of {', '.join(model.model_fields)}"


def _model_in(annotation: Any) -> type[BaseModel]:
    """The model in `list[Model]` or `Model`."""
    inner = typing.get_args(annotation)
    model: type[BaseModel] = inner[0] if inner else annotation
    return model


def _written(place: Place) -> str:
    """`deployments[0].schedules[1].slug`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    return text.lstrip(".") or "the file"


def _line(text: str, place: Place) -> str:
    """The line of the place, or of its deepest existing parent; empty if an alias inserted it."""
    node, line = yaml.compose(text, Loader=yaml.SafeLoader), None
    for part in place:
        if isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            node = node.value[part]
            line = node.start_mark.line
            continue
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        pair = next((pair for pair in pairs if pair[0].value == part), None)
        if pair is None:
            break
        line, node = pair[0].start_mark.line, pair[1]
    return "" if line is None else f" (line {line + 1})"
