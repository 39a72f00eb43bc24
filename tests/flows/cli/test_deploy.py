"""`dpo deploy` before it sends anything: parameters, recipes, workspaces; and what counts as a difference."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.prefect_file import Deployment, read_prefect_file
from dpo_core.errors import RecipeError
from tests.scenarios.bad_inputs import dpo
from tests.support.runs.tracked import free_port

GOOD: dict[str, Any] = {
    "name": "nightly",
    "entrypoint": "flows.deployed.deployed",
    "parameters": {"recipe": "demo"},
    "concurrency_limit": {"limit": 1},
    "work_pool": {"name": "dpo", "job_variables": {"working_dir": "/srv/dpo"}},
    "schedules": [{"slug": "night", "cron": "0 1 * * *", "timezone": "UTC", "active": True}],
    "triggers": [
        {
            "type": "event",
            "name": "new",
            "expect": ["b", "a"],
            "parameters": {"data": "{{ event.payload.path }}"},
        }
    ],
}
NIGHT, NEW = GOOD["schedules"][0], GOOD["triggers"][0]


def deployment(**changes: Any) -> Deployment:
    return Deployment.model_validate(copy.deepcopy(GOOD) | changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"entrypoint": "flows.nowhere.deployed"}, "cannot be imported"),
        ({"entrypoint": "flows.deployed.keep_quiet"}, "is not a flow"),
        ({"parameters": {}}, "recipe: Field required"),
        ({"parameters": {"recipe": "demo", "recipee": 1}}, "recipee"),
        ({"parameters": {"recipe": 3}}, "recipe"),
        ({"parameters": {"recipe": "dmo"}}, "nightly: there is no recipe named dmo"),
        ({"parameters": {"recipe": "mine.yaml"}}, "workers run in other folders"),
        (
            {"parameters": {"recipe": "demo", "overrides": ["policies.DPO.epoch=2"]}},
            "did you mean policies.DPO.epochs?",
        ),
        ({"parameters": {"recipe": "demo", "on": "moon"}}, "nightly: there is no launcher 'moon'"),
        ({"parameters": {"recipe": "demo", "on": "kubernetes"}}, "nightly: the settings for kubernetes"),
        ({"parameters": {"recipe": "demo", "on": "slurm", "settings": "x.yaml"}}, "run in other folders"),
        ({"schedules": [NIGHT | {"parameters": {"recipe": "dmo"}}]}, "nightly schedule night: there is"),
        ({"triggers": [NEW | {"parameters": {"path": "x"}}]}, "nightly trigger new: parameters:"),
        ({"work_pool": {"name": "dpo"}}, "the workspace ./runs is a relative path, and a worker starts"),
    ],
)  # fmt: skip
def test_what_could_only_fail_at_night_is_refused_by_day(changes: dict[str, Any], words: str) -> None:
    from flows.commands.deploy import check_deployment

    check_deployment(deployment())
    with pytest.raises(RecipeError) as caught:
        check_deployment(deployment(**changes))
    assert words in str(caught.value)


def test_a_whole_path_as_workspace_needs_no_working_folder() -> None:
    from flows.commands.deploy import check_deployment

    given = {"recipe": "demo", "overrides": ["workspace=/srv/dpo/runs"]}
    check_deployment(deployment(parameters=given, work_pool={"name": "dpo"}))


def test_a_package_in_the_working_folder_that_would_replace_the_flow_is_refused(tmp_path: Path) -> None:
    from flows.commands.deploy import check_deployment

    (tmp_path / "flows").mkdir()
    (tmp_path / "flows" / "__init__.py").touch()
    pool: dict[str, Any] = {"name": "dpo", "job_variables": {"working_dir": str(tmp_path)}}
    for pool["job_variables"]["env"] in ({}, {"PYTHONSAFEPATH": "1"}):  # Prefect looks there all the same
        with pytest.raises(RecipeError, match=r"in working_dir .* cannot be imported .*flows.deployed"):
            check_deployment(deployment(work_pool=pool))
    (tmp_path / "flows").rename(tmp_path / "tasks")
    pool["job_variables"]["env"] = {"OTHER": "1"}
    with pytest.raises(RecipeError, match=f"imports {tmp_path}/tasks/__init__.py in place of the installed"):
        check_deployment(deployment(work_pool=pool))
    (tmp_path / "tasks").rename(tmp_path / "mine")
    pool["job_variables"]["env"] = {"OTHER": "2"}
    check_deployment(deployment(work_pool=pool))


def test_files_of_a_recipe_are_named_by_absolute_paths() -> None:
    from flows.commands.deploy import check_deployment

    def check(sets: list[str], **changes: Any) -> None:
        check_deployment(deployment(parameters={"recipe": "hh-harmless", "overrides": sets}, **changes))

    check(["data.path=/data/pairs.jsonl"])
    check(["data.path=Anthropic/hh-rlhf"])  # of the hub
    check([], schedules=[])  # the trigger names the data
    for sets, file in (
        ([], "data: hh_harmless_base_test.jsonl.gz"),
        (["data.path=./pairs"], "data: ./pairs"),
        (["data.path=/data/pairs.jsonl", "reward.source=mine.py:score"], "reward.source: mine.py"),
        (["data.path=/data/pairs.jsonl", "gate.baseline=gate.json"], "gate.baseline: gate.json"),
    ):
        with pytest.raises(RecipeError, match=f"nightly.*: {file} is a relative path"):
            check(sets)


def test_prefects_own_model_takes_the_shipped_file() -> None:
    from flows.commands.deploy import check_deployment, check_with_prefect

    path = Path(__file__).resolve().parents[3] / "deploy" / "prefect.yaml"
    file, raw = read_prefect_file(path, {"DPO_HOME": "/srv/dpo"})
    check_with_prefect(path, raw)
    assert {check_deployment(one).name for one in file.deployments} == {"dpo"}
    raw["deployments"][0]["schedules"][0]["cron"] = 5
    with pytest.raises(RecipeError, match="Prefect refuses"):
        check_with_prefect(path, raw)


def fields(**changes: Any) -> dict[str, Any]:
    from flows.deployed import deployed
    from tasks.scheduling.deployments import wanted

    return wanted(deployment(**changes), deployed)


def told(new: dict[str, Any], old: dict[str, Any] | None) -> list[str]:
    from tasks.scheduling.deployments import difference

    return [str(change) for change in difference("nightly", new, old)]


def test_the_same_is_no_difference_whatever_its_order() -> None:
    other = fields(tags=[], triggers=[NEW | {"expect": ["a", "b"]}], parameters={"recipe": "demo"})
    assert told(other, json.loads(json.dumps(fields()))) == []


def test_differences_are_told_by_schedule_trigger_and_field() -> None:
    day = {"slug": "day", "cron": "0 13 * * *", "timezone": "Europe/Berlin", "active": False}
    new = fields(
        schedules=[NIGHT | {"cron": "0 3 * * *"}, day],
        triggers=[],
        parameters={"recipe": "frontier"},
        concurrency_limit={"limit": 2, "collision_strategy": "CANCEL_NEW"},
    )
    old = fields(schedules=[NIGHT, NIGHT | {"slug": "gone"}])
    assert [line.partition(": {")[0] for line in told(new, old)] == [
        "+ nightly schedule day: cron 0 13 * * *, Europe/Berlin, paused",
        "- nightly schedule gone: cron 0 1 * * *, UTC",
        "~ nightly schedule night cron: 0 1 * * * -> 0 3 * * *",
        "- nightly trigger new: on event a or b for resource any",
        "~ nightly collision_strategy: ENQUEUE -> CANCEL_NEW",
        "~ nightly concurrency_limit: 1 -> 2",
        "~ nightly parameters",
    ]


def test_all_of_a_new_deployment_is_added() -> None:
    kinds = [line.partition(": ")[0] for line in told(fields(), None)]
    assert kinds == ["+ nightly", "+ nightly schedule night", "+ nightly trigger new"]


@pytest.mark.parametrize(
    ("url", "slug"),
    [
        ("https://example.org/hook", "webhook"),
        ("https://hooks.slack.com/services/T1H9RESGL/B03NGM7KX/xoxb1234567890abcdefghij", "slack-webhook"),
        ("json://localhost/x", "slack-webhook"),
        ("mailto://user:pass@example.org", "slack-webhook"),
    ],
)
def test_an_address_is_kept_in_the_block_that_can_send_to_it(url: str, slug: str) -> None:
    from tasks.scheduling.alerts import _block

    block = _block(url)
    assert block.get_block_type_slug() == slug
    assert url not in repr(block)
    if slug != "webhook":
        assert len(block._apprise_client) == 1, "Apprise has a service for it"


def test_an_address_that_nobody_can_send_to_is_refused_without_showing_it() -> None:
    from tasks.scheduling.alerts import _block

    with pytest.raises(RecipeError) as caught:
        _block("carrier-pigeon://secret-loft")
    assert "carrier-pigeon" in str(caught.value)
    assert "secret-loft" not in str(caught.value)


def test_the_command_line_tells_what_is_wrong_and_when_it_would_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    monkeypatch.setenv("DPO_HOME", str(tmp_path))
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        done = dpo("deploy", "--dry-run", "--json")
        assert done.code == 0, done.err
        plan = json.loads(done.out)
        assert {name: len(times) for name, times in plan["next"].items()} == {
            "nightly every-night": 5,
            "weekly-frontier every-saturday": 5,
        }
        done = dpo("deploy")
        assert (done.code, len(done.errors)) == (2, 1)
        assert "no Prefect server is configured" in done.errors[0]
    path = tmp_path / "prefect.yaml"
    path.write_text(yaml.safe_dump({"deployments": [GOOD | {"shedules": []}]}))
    done = dpo("deploy", "--file", str(path), "--dry-run")
    assert done.code == 2
    assert "shedules (line" in done.errors[0]
    assert "did you mean schedules?" in done.errors[0]


def test_an_event_of_data_that_is_not_there_is_refused(tmp_path: Path) -> None:
    done = dpo("event", "new-data", str(tmp_path / "absent.jsonl"))
    assert done.code == 2
    assert "there is no data at" in done.errors[0]


@pytest.mark.parametrize("command", [["deploy"], ["schedule", "list"], ["event", "new-data", "."]])
def test_a_server_that_is_away_is_named(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    monkeypatch.setenv("DPO_HOME", str(tmp_path))
    away = f"http://127.0.0.1:{free_port()}/api"
    with temporary_settings({PREFECT_API_URL: away}):
        done = dpo(*command)
    assert done.code == 2
    assert f"the Prefect server at {away} does not answer" in done.errors[0]


@pytest.mark.parametrize("path", ["/data/a b.jsonl", "null", "/x/{a: 1}", "/x/ü'\".jsonl"])
def test_a_data_set_of_any_name_takes_the_recipes_place(path: str) -> None:
    from flows.commands.worker_run import command_of, data_overrides
    from tasks.recipe.read import load_recipe

    sets = data_overrides(path)
    assert load_recipe("demo", sets).data.path == path
    assert load_recipe("hh-harmless", data_overrides(path)).data.path == path
    assert command_of("demo", data_overrides(None)) == "dpo run demo"
