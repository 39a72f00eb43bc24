"""Converts schedules of the deployment file to Prefect's, and computes when they fire next."""

import asyncio
from datetime import UTC, datetime
from typing import Any
from zoneinfo import ZoneInfo

from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule, RRuleSchedule
from prefect.server.schemas.schedules import SCHEDULE_TYPES
from pydantic import TypeAdapter, ValidationError

from deploy.prefect_file import DeploymentSchedule
from dpo_core.errors import RecipeError


def prefect_schedule(schedule: DeploymentSchedule, where: str) -> Any:
    """The schedule as an object of Prefect's client.

    Raises:
        RecipeError: its cron line or recurrence rule is invalid.
    """
    zone = schedule.timezone
    try:
        if schedule.cron is not None:
            return CronSchedule(cron=schedule.cron, timezone=zone, day_or=schedule.day_or)
        if schedule.rrule is not None:
            return RRuleSchedule(rrule=schedule.rrule, timezone=zone)
        assert schedule.interval is not None
        assert schedule.anchor_date is not None
        anchor = schedule.anchor_date
        if anchor.tzinfo is None:
            anchor = anchor.replace(tzinfo=ZoneInfo(zone))
        return IntervalSchedule(interval=schedule.interval, anchor_date=anchor, timezone=zone)
    except ValidationError as error:
        fault = error.errors()[0]
        raise RecipeError(
            f"{where}: {fault['msg'].removeprefix('Value error, ')} (value: {fault['input']!r})",
            "Correct it; nothing was sent to the server",
        ) from error


def comparable(schedule: Any) -> dict[str, Any]:
    """A client's schedule as JSON that can be compared; its anchor date is converted to UTC."""
    fields: dict[str, Any] = schedule.model_dump(mode="json", exclude_none=True)
    if anchor := getattr(schedule, "anchor_date", None):
        fields["anchor_date"] = anchor.astimezone(UTC).isoformat()
    return fields


def next_times(schedule: Any, count: int = 5, start: datetime | None = None) -> list[datetime]:
    """The next times at which a client's schedule fires, by the server's rules, in the schedule's time
    zone."""
    kind: Any = TypeAdapter(SCHEDULE_TYPES)
    on_server = kind.validate_python(schedule.model_dump())
    times = asyncio.run(on_server.get_dates(n=count, start=start or datetime.now(UTC)))
    zone = ZoneInfo(schedule.timezone or "UTC")
    return [datetime.fromtimestamp(time.timestamp(), zone) for time in times]
