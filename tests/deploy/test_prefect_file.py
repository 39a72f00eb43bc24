"""The strict reading of a deploy file: the shipped one, and every way to write it wrongly."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.prefect_file import read_prefect_file
from dpo_core.errors import RecipeError

SHIPPED = Path(__file__).resolve().parents[2] / "deploy" / "prefect.yaml"
HOME = {"DPO_HOME": "/srv/dpo"}
GOOD: dict[str, Any] = {
    "pull": [],
    "deployments": [
        {
            "name": "nightly",
            "entrypoint": "flows.deployed.deployed",
            "parameters": {"recipe": "demo"},
            "concurrency_limit": {"limit": 1},
            "work_pool": {"name": "dpo", "job_variables": {"working_dir": "/srv/dpo"}},
            "schedules": [{"slug": "night", "cron": "0 1 * * *", "timezone": "UTC", "active": True}],
            "triggers": [{"type": "event", "name": "new", "expect": ["dpo.dataset.new"]}],
        }
    ],
}


def changed(place: str, value: Any) -> dict[str, Any]:
    """The good file with one value set (or, for `...`, taken away)."""
    made = copy.deepcopy(GOOD)
    inner: Any = made
    *path, last = (int(part) if part.isdigit() else part for part in place.split("."))
    for part in path:
        inner = inner[part]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return made


def read(folder: Path, body: Any, environment: dict[str, str] | None = None) -> Any:
    path = folder / "prefect.yaml"
    path.write_text(body if isinstance(body, str) else yaml.safe_dump(body, sort_keys=False))
    return read_prefect_file(path, environment or {})[0]


def test_the_shipped_file_has_the_four_deployments() -> None:
    file, raw = read_prefect_file(SHIPPED, HOME)
    by_name = {one.name: one for one in file.deployments}
    assert list(by_name) == ["nightly", "new-data", "weekly-frontier", "on-demand"]
    for one in file.deployments:
        assert (one.concurrency_limit.limit, one.concurrency_limit.collision_strategy) == (1, "ENQUEUE")
        assert one.work_pool.job_variables["working_dir"] == "/srv/dpo"
        assert "dpo" in one.tags, "alerts go by the tag"
    assert [s.slug for one in file.deployments for s in one.schedules] == ["every-night", "every-saturday"]
    (trigger,) = by_name["new-data"].triggers
    assert trigger.parameters == {"data": "{{ event.payload.path }}"}, "Prefect's to fill in"
    assert "definitions" not in raw


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        ("deployments.0.entrypont", "x.y", "[0].entrypont: there is no such key (did you mean entrypoint?)"),
        ("deployments.0.schedules.0.timezon", "UTC", "deployments[0].schedules[0].timezon: there is no"),
        ("deployments.0.work_pool.job_variabels", {}, "there is no such key (did you mean job_variables?)"),
        ("deployments.0.concurrency_limit.grace_period", 60, "did you mean grace_period_seconds?"),
        ("deployments.0.triggers.0.expected", ["x"], "did you mean expect?"),
        ("deploymets", [], "deploymets: there is no such key (did you mean deployments?)"),
        ("deployments.0.zzz", 1, "use one of name, description"),
        ("deployments.0.schedules.0.timezone", "Europe/Berlim", "did you mean Europe/Berlin?"),
        ("deployments.0.schedules.0.timezone", ..., "schedules[0].timezone: Field required"),
        ("deployments.0.schedules.0.slug", ..., "slug: Field required"),
        ("deployments.0.schedules.0.active", ..., "active: Field required"),
        ("deployments.0.schedules.0.slug", "Every Night", "should match pattern"),
        ("deployments.0.schedules.0.interval", 60, "exactly one of cron, interval, rrule (set: cron,"),
        ("deployments.0.schedules.0.anchor_date", "2026-01-01", "anchor_date must be set together"),
        ("deployments.0.concurrency_limit.limit", 0, "greater than or equal to 1 (the value is 0)"),
        ("deployments.0.concurrency_limit.collision_strategy", "QUEUE", "'ENQUEUE' or 'CANCEL_NEW'"),
        ("deployments.0.entrypoint", "flows/deployed.py:deployed", "should match pattern"),
        ("deployments.0.triggers.0.expect", [], "at least 1 item"),
        ("deployments.0.tags", ["{{ prefect.variables.x }}"], "is not of the form {{ $NAME }}"),
        ("deployments.0.tags", ["{{ $NOT_SET }}"], "tags[0]: {{ $NOT_SET }} is not set in"),
        ("pull", [{"prefect.deployments.steps.git_clone": {}}], "at most 0 items"),
        ("deployments", [], "at least 1 item"),
    ],
)  # fmt: skip
def test_a_fault_is_named_with_its_place_and_line(tmp_path: Path, place: str, value: Any, words: str) -> None:
    read(tmp_path, GOOD)
    with pytest.raises(RecipeError) as caught:
        read(tmp_path, changed(place, value))
    told = str(caught.value)
    assert words in re.sub(r" \(line \d+\)", "", told)
    for name, line in re.findall(r"([\w-]+)(?:\[\d+\])? \(line (\d+)\): there is no", told):
        assert name in (tmp_path / "prefect.yaml").read_text().splitlines()[int(line) - 1]
    assert re.search(r"\(line \d+\): ", told), "every fault has its line"


def test_a_deployment_without_a_limit_runs_one_at_a_time(tmp_path: Path) -> None:
    limit = read(tmp_path, changed("deployments.0.concurrency_limit", ...)).deployments[0].concurrency_limit
    assert (limit.limit, limit.collision_strategy) == (1, "ENQUEUE")


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("deployments.0.schedules", "the slug night appears twice"),
        ("deployments.0.triggers", "the trigger new appears twice"),
        ("deployments", "the deployment nightly appears twice"),
    ],
)
def test_what_is_known_by_its_name_is_there_once(tmp_path: Path, place: str, words: str) -> None:
    inner: Any = GOOD
    for part in place.split("."):
        inner = inner[int(part) if part.isdigit() else part]
    with pytest.raises(RecipeError, match=words):
        read(tmp_path, changed(place, inner * 2))


@pytest.mark.parametrize("rule", [{"rrule": "FREQ=DAILY"}, {"interval": 3600}, {}])
def test_a_rule_whose_times_would_move_with_each_deployment_is_refused(tmp_path: Path, rule: Any) -> None:
    schedule = {"slug": "night", "timezone": "UTC", "active": True, **rule}
    with pytest.raises(RecipeError, match=r"DTSTART|anchor_date|exactly one"):
        read(tmp_path, changed("deployments.0.schedules", [schedule]))


def test_every_fault_is_told_at_once_and_an_alias_once(tmp_path: Path) -> None:
    text = SHIPPED.read_text().replace("active: true", "activ: true", 1)
    with pytest.raises(RecipeError) as caught:
        read(tmp_path, text)
    assert str(caught.value).count("{{ $DPO_HOME }} is not set") == 1
    with pytest.raises(RecipeError) as caught:
        read(tmp_path, text, HOME)
    assert str(caught.value).count("activ") == 3, "the unknown key, what was meant, and what is missing"


@pytest.mark.parametrize("text", ["a: [", "- 1", "\x00"])
def test_what_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(RecipeError, match=r"is not valid YAML|is not a mapping"):
        read(tmp_path, text)
