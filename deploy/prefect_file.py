"""What a `prefect.yaml` may say, strictly: Prefect itself drops the unknown keys of a deployment."""

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


class Schedule(Config):
    """When a deployment runs by itself: exactly one of `cron`, `interval` and `rrule`."""

    slug: str = Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")
    """What the schedule is known by; under another slug it is another schedule."""
    timezone: str
    """IANA time zone that its times are meant in."""
    active: bool
    """Whether it fires."""
    cron: str | None = None
    interval: timedelta | None = Field(None, gt=timedelta(0))
    """Seconds, or ISO 8601 (PT6H)."""
    rrule: str | None = None
    """RFC 5545, with its DTSTART in local time: without one, the times move with each deployment."""
    anchor_date: datetime | None = None
    """What an interval is counted from; without one it would be counted from the moment of deploying."""
    day_or: bool = True
    """Whether cron's day of the month and day of the week are alternatives."""
    parameters: dict[str, Any] = Field(default_factory=dict)
    """Laid over the deployment's."""

    @field_validator("timezone")
    @classmethod
    def _known(cls, zone: str) -> str:
        if zone not in available_timezones():
            near = difflib.get_close_matches(zone, available_timezones(), n=1, cutoff=0.7)
            meant = f" (did you mean {near[0]}?)" if near else "; for example UTC or Europe/Berlin"
            raise ValueError(f"no IANA time zone is named so{meant}")
        return zone

    @model_validator(mode="after")
    def _one_kind(self) -> "Schedule":
        given = [name for name in ("cron", "interval", "rrule") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of cron, interval, rrule (given: {', '.join(given) or 'none'})"
            )
        if (self.interval is None) != (self.anchor_date is None):
            raise ValueError("interval and anchor_date belong together")
        if self.interval and self.interval >= timedelta(days=1) and _changes_clocks(self.timezone):
            # Prefect counts the seconds from the anchor: across a change of the clocks that is another hour.
            raise ValueError(
                f"an interval of days would move by an hour with the clocks of {self.timezone}: write cron, "
                "or timezone: UTC"
            )
        if self.rrule is not None and "DTSTART" not in self.rrule:
            raise ValueError("an rrule needs its DTSTART, such as DTSTART:20260101T040000")
        if self.cron is None and not self.day_or:
            raise ValueError("day_or would not be read: there is no cron")
        return self


class Trigger(Config):
    """Which event runs the deployment, and what of the event it is given."""

    type: Literal["event"]
    name: str = Field(min_length=1)
    """Name of the automation that Prefect makes of it."""
    description: str = ""
    enabled: bool = True
    expect: list[str] = Field(min_length=1)
    """Names of events; a `*` at the end stands for any ending."""
    match: dict[str, str | list[str]] = Field(default_factory=dict)
    """Labels of the event's resource."""
    match_related: dict[str, str | list[str]] = Field(default_factory=dict)
    """Labels of a resource that the event is related to."""
    parameters: dict[str, Any] = Field(default_factory=dict)
    """Laid over the deployment's; `{{ event.payload.x }}` is filled in when the event comes."""
    schedule_after: timedelta = Field(timedelta(0), ge=timedelta(0))
    """How long the run waits after the event."""


class Limit(Config):
    """How many runs of the deployment go at once, and what becomes of the next."""

    limit: int = Field(ge=1)
    collision_strategy: Literal["ENQUEUE", "CANCEL_NEW"] = "ENQUEUE"
    grace_period_seconds: int = Field(600, ge=60, le=86400)
    """After which the slot of a run that never started is free again."""


class WorkPool(Config):
    """Which workers take the runs."""

    name: str = Field(min_length=1)
    work_queue_name: str = "default"
    job_variables: dict[str, Any] = Field(default_factory=dict)
    """Fields of the pool's template; for a process: `working_dir`, `env`."""


class Deployment(Config):
    """A flow with its parameters, its workers, and when it runs."""

    name: str = Field(pattern=_NAME)
    description: str = ""
    version: str | None = None
    tags: list[str] = Field(default_factory=list)
    entrypoint: str = Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)+$")
    """Dotted path of a flow in an installed package: the worker's folder holds no code."""
    parameters: dict[str, Any] = Field(default_factory=dict)
    enforce_parameter_schema: bool = True
    paused: bool = False
    concurrency_limit: Limit
    work_pool: WorkPool
    schedules: list[Schedule] = Field(default_factory=list)
    triggers: list[Trigger] = Field(default_factory=list)

    @model_validator(mode="after")
    def _once(self) -> "Deployment":
        _no_twins("slug", [schedule.slug for schedule in self.schedules])
        _no_twins("trigger", [trigger.name for trigger in self.triggers])
        return self


class PrefectFile(Config):
    """The whole file."""

    prefect_version: str | None = Field(None, alias="prefect-version")
    name: str | None = None
    pull: list[dict[str, Any]] = Field(default_factory=list, max_length=0)
    """Empty: the flow comes with the package."""
    definitions: Any = None
    """Anchors for the rest of the file; read by nobody."""
    deployments: list[Deployment] = Field(min_length=1)

    @model_validator(mode="after")
    def _once(self) -> "PrefectFile":
        _no_twins("deployment", [deployment.name for deployment in self.deployments])
        _no_twins("trigger", [trigger.name for one in self.deployments for trigger in one.triggers])
        return self


def _changes_clocks(zone: str) -> bool:
    """Whether summer and winter differ there."""
    offsets = {datetime(2026, month, 1, tzinfo=ZoneInfo(zone)).utcoffset() for month in range(1, 13)}
    return len(offsets) > 1


def _no_twins(what: str, names: list[str]) -> None:
    twins = [name for name, count in Counter(names).items() if count > 1]
    if twins:
        raise ValueError(f"there are two of the {what} {twins[0]}")


def read_prefect_file(path: Path, environment: Mapping[str, str]) -> tuple[PrefectFile, dict[str, Any]]:
    """The file, and the plain mapping it was read from; `{{ $NAME }}` is replaced from the environment.

    Raises:
        RecipeError: with every fault: where it stands, its line, and the nearest key for one that is unknown.
    """
    try:
        text = read_small(path)
        raw = read_yaml(text)
    except OSError as error:
        raise RecipeError(f"{path} cannot be read ({error.strerror})", "Name it with --file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = " ".join(str(error).split())
        raise RecipeError(f"{path} is not valid YAML: {where}", "Mend the line it names") from error
    if not isinstance(raw, dict):
        raise RecipeError(f"{path} is not a mapping", "Start from the deploy/prefect.yaml of the package")
    faults: list[tuple[Place, str]] = []
    definitions = raw.pop("definitions", None)  # what is used of it stands where it is used
    filled = _filled(raw, environment, (), faults)
    if not faults:
        try:
            return PrefectFile.model_validate(filled | {"definitions": definitions}), filled
        except ValidationError as error:
            faults = [(fault["loc"], _said(fault)) for fault in error.errors()]
    once: dict[tuple[str, str], str] = {}  # what an alias repeats stands in the file once
    for place, said in faults:
        line = _line(text, place)
        once.setdefault((line or _written(place), said), f"{_written(place)}{line}: {said}")
    told = "; ".join(once.values())
    raise RecipeError(f"{path} cannot be deployed: {told}", "Mend it; nothing was sent to the server")


def _filled(value: Any, environment: Mapping[str, str], place: Place, faults: list[tuple[Place, str]]) -> Any:
    """The value with its `{{ $NAME }}` replaced. Parameters of a trigger are Prefect's to fill in, and so are
    blocks and variables in what a worker is given."""
    if isinstance(value, dict):
        return {key: _filled(inner, environment, (*place, key), faults) for key, inner in value.items()}
    if isinstance(value, list):
        return [_filled(inner, environment, (*place, index), faults) for index, inner in enumerate(value)]
    if not isinstance(value, str) or place[2:3] == ("triggers",):
        return value

    def replaced(found: re.Match[str]) -> str:
        asked = found[1]
        if asked.startswith(_KEPT_BY_PREFECT) and place[2:4] == ("work_pool", "job_variables"):
            return found[0]
        if asked.startswith("$") and SECRET_NAME.search(asked):
            faults.append((place, f"{{{{ {asked} }}}} {_SHOWN_THERE}"))
            return ""
        if asked.startswith("$") and asked[1:] in environment:
            return environment[asked[1:]]
        if asked.startswith("$"):
            what = f"is not set in the environment (export {asked[1:]}=…)"
        else:
            what = "is not of the form {{ $NAME }}"
        faults.append((place, f"{{{{ {asked} }}}} {what}"))
        return ""

    return _PLACEHOLDER.sub(replaced, value)


_KEPT_BY_PREFECT = ("prefect.blocks.", "prefect.variables.")
_SHOWN_THERE = (
    "looks like a secret, and the server shows what it is sent; keep it in a block, and write "
    "{{ prefect.blocks.secret.NAME }} in job_variables"
)


def _said(fault: Any) -> str:
    if fault["type"] == "extra_forbidden":
        return f"there is no such key{_meant(fault['loc'])}"
    given = "" if isinstance(fault["input"], dict | list) else f" (given {fault['input']!r})"
    return f"{fault['msg'].removeprefix('Value error, ')}{given}"


def _meant(place: Place) -> str:
    """The nearest among the keys that may stand where an unknown one was written."""
    model: Any = PrefectFile
    for part in place[:-1]:
        if not isinstance(part, int):
            model = _model_in(model.model_fields[part].annotation)
    near = difflib.get_close_matches(str(place[-1]), model.model_fields, n=1)
    return f" (did you mean {near[0]}?)" if near else f"; known are {', '.join(model.model_fields)}"


def _model_in(annotation: Any) -> type[BaseModel]:
    """The model in `list[Model]` or `Model`."""
    inner = typing.get_args(annotation)
    found: type[BaseModel] = inner[0] if inner else annotation
    return found


def _written(place: Place) -> str:
    """`deployments[0].schedules[1].slug`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    return text.lstrip(".") or "the file"


def _line(text: str, place: Place) -> str:
    """Where in the file the place is written, or what of it is; nothing where an alias stands for it."""
    node, line = yaml.compose(text, Loader=yaml.SafeLoader), None
    for part in place:
        if isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            node = node.value[part]
            line = node.start_mark.line
            continue
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        found = next((pair for pair in pairs if pair[0].value == part), None)
        if found is None:
            break
        line, node = found[0].start_mark.line, found[1]
    return "" if line is None else f" (line {line + 1})"
