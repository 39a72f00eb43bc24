"""Fire times of schedules across daylight-saving changes, checked against the IANA tables."""

from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from prefect.client.schemas.schedules import IntervalSchedule
from pydantic import ValidationError

from tasks.scheduling.deployment_file import DeploymentSchedule
from tasks.scheduling.deployments import next_times


def times(start: str, count: int, **rule: Any) -> list[str]:
    schedule = DeploymentSchedule(slug="s", active=True, **({"timezone": "Europe/Berlin"} | rule))
    fire_times = next_times(schedule.for_prefect().schedule, count, datetime.fromisoformat(start))
    return [time.isoformat(timespec="minutes") for time in fire_times]


SPRING = ["2027-03-27T04:30+01:00", "2027-03-28T04:30+02:00", "2027-03-29T04:30+02:00"]
AUTUMN = ["2026-10-24T04:30+02:00", "2026-10-25T04:30+01:00", "2026-10-26T04:30+01:00"]
RULES = {
    "cron": {"cron": "30 4 * * *"},
    "rrule": {"rrule": "DTSTART:20260101T043000\nRRULE:FREQ=DAILY"},
}


@pytest.mark.parametrize("kind", RULES)
def test_a_daily_schedule_keeps_its_local_hour_when_the_clocks_change(kind: str) -> None:
    assert times("2027-03-27T00:00:00Z", 3, **RULES[kind]) == SPRING
    assert times("2026-10-24T00:00:00Z", 3, **RULES[kind]) == AUTUMN


def test_an_interval_of_days_is_refused_where_the_clocks_change() -> None:
    daily = {"interval": 86400, "anchor_date": "2026-01-01T04:30:00"}
    with pytest.raises(ValidationError, match="use cron"):
        times("2026-06-01T00:00:00Z", 1, **daily)
    # What it is refused for: anchored in winter, Prefect's daily interval is an hour off in summer.
    schedule = IntervalSchedule(
        interval=timedelta(days=1),
        anchor_date=datetime(2026, 1, 1, 4, 30, tzinfo=ZoneInfo("Europe/Berlin")),
        timezone="Europe/Berlin",
    )
    assert next_times(schedule, 1, datetime(2026, 6, 1, tzinfo=UTC))[0].hour == 5
    assert times("2026-06-01T00:00:00Z", 1, timezone="UTC", **daily) == ["2026-06-01T04:30+00:00"]


@pytest.mark.parametrize("zone", ["Europe/Berln", "Europe"])
def test_an_interval_in_an_unknown_time_zone_is_refused(zone: str) -> None:
    with pytest.raises(ValidationError, match=f"{zone} is not the name of a time zone"):
        times("2026-06-01T00:00:00Z", 1, interval=3600, anchor_date="2026-01-01T00:00:00", timezone=zone)


def test_in_new_york_they_change_on_other_days() -> None:
    fire_times = times("2027-03-13T00:00:00Z", 3, cron="0 6 * * *", timezone="America/New_York")
    assert fire_times == ["2027-03-13T06:00-05:00", "2027-03-14T06:00-04:00", "2027-03-15T06:00-04:00"]


def test_utc_has_no_such_day() -> None:
    fire_times = times("2027-03-27T12:00:00Z", 2, cron="30 2 * * *", timezone="UTC")
    assert fire_times == ["2027-03-28T02:30+00:00", "2027-03-29T02:30+00:00"]


def test_an_hour_that_is_missing_fires_once_and_one_that_comes_twice_fires_once() -> None:
    missing = times("2027-03-27T12:00:00Z", 3, cron="30 2 * * *")
    assert [time[:10] for time in missing] == ["2027-03-28", "2027-03-29", "2027-03-30"]
    twice = times("2026-10-24T12:00:00Z", 3, cron="30 2 * * *")
    assert [time[:10] for time in twice] == ["2026-10-25", "2026-10-26", "2026-10-27"]


def test_hours_are_hours_in_an_interval_of_hours() -> None:
    fire_times = times("2027-03-27T22:00:00Z", 4, interval=3 * 3600, anchor_date="2026-01-01T00:00:00")
    stamps = [datetime.fromisoformat(time).timestamp() for time in fire_times]
    assert {later - earlier for earlier, later in pairwise(stamps)} == {3 * 3600}
