"""`dpo deploy` before it sends anything: the file, parameters, recipes, and what is a difference."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
import yaml

from dpo_core.errors import RecipeError
from tests.scenarios.bad_inputs import dpo
from tests.support.runs.tracked import free_port

REPO = Path(__file__).resolve().parents[3]
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
ZONE = {"slug": "night", "timezone": "UTC", "active": True}


def deployment(**changes: Any) -> Any:
    from tasks.scheduling.deployment_file import Deployment

    return Deployment.model_validate(copy.deepcopy(GOOD) | changes)


def read(folder: Path, body: Any) -> Any:
    from flows.commands.deploy import read_deployment_file

    path = folder / "prefect.yaml"
    path.write_text(body if isinstance(body, str) else yaml.safe_dump(body, sort_keys=False))
    return read_deployment_file(path).deployments


def changed(place: str, value: Any) -> dict[str, Any]:
    """The good file with one value set (or, for `...`, taken away)."""
    made = copy.deepcopy({"pull": [], "deployments": [GOOD]})
    inner: Any = made
    *path, last = (int(part) if part.isdigit() else part for part in place.split("."))
    for part in path:
        inner = inner[part]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return made


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        ("deployments.0.entrypont", "x.y", "deployments.0.entrypont (did you mean entrypoint?)"),
        ("deployments.0.schedules.0.timezon", "UTC", "(did you mean timezone?)"),
        ("deployments.0.work_pool.job_variabels", {}, "(did you mean job_variables?)"),
        ("deployments.0.concurrency_limit.grace_period", 60, "did you mean grace_period_seconds?"),
        ("deployments.0.triggers.0.expected", ["x"], "did you mean expect?"),
        ("deploymets", [], "there is no field deploymets (did you mean deployments?)"),
        ("deployments.0.schedules.0.timezone", "Europe/Berlim", "schedules.0: "),
        ("deployments.0.schedules.0.timezone", ..., "schedules.0.timezone: Field required"),
        ("deployments.0.schedules.0.slug", ..., "slug: Field required"),
        ("deployments.0.schedules.0.slug", "Every Night", "should match pattern"),
        ("deployments.0.schedules.0.interval", 60, "must be set together"),
        ("deployments.0.schedules.0.rrule", "DTSTART:20260101T040000", "one schedule type"),
        ("deployments.0.schedules.0.cron", ..., "schedules.0: set one of cron"),
        ("deployments.0.schedules.0.cron", "61 1 * * *", "61 1"),
        ("deployments.0.concurrency_limit.limit", 0, "greater than or equal to 1 (given 0)"),
        ("deployments.0.concurrency_limit.collision_strategy", "QUEUE", "'ENQUEUE' or 'CANCEL_NEW'"),
        ("deployments.0.entrypoint", "flows/deployed.py:deployed", "should match pattern"),
        ("deployments.0.triggers.0.expect", [], "at least 1 item"),
        ("deployments.0.tags", ["{{ prefect.x }}"], "tags.0: {{ prefect.x }} is not of the form {{ $NAME }}"),
        ("deployments.0.tags", ["{{ $NOT_SET }}"], "tags.0: {{ $NOT_SET }} is not set in"),
        ("pull", [{"prefect.deployments.steps.git_clone": {}}], "at most 0 items"),
        ("deployments", [], "at least 1 item"),
        ("deployments.0.schedules", [NIGHT, NIGHT], "the slug night appears twice"),
        ("deployments.0.triggers", [NEW, NEW], "the trigger new appears twice"),
        ("deployments", [GOOD, GOOD], "the deployment nightly appears twice"),
        ("deployments.0.schedules.0", {**ZONE, "rrule": "FREQ=DAILY"}, "DTSTART"),
        ("deployments.0.schedules.0", {**ZONE, "interval": 3600}, "anchor_date"),
    ],
)  # fmt: skip
def test_a_fault_of_the_file_is_named_with_its_place(
    tmp_path: Path, place: str, value: Any, words: str
) -> None:
    assert read(tmp_path, changed("name", "x"))[0].concurrency_limit.limit == 1
    with pytest.raises(RecipeError) as caught:
        read(tmp_path, changed(place, value))
    assert words in str(caught.value)


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


def test_the_file_printed_for_a_recipe_can_be_deployed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.commands.deploy import check_file, fire_times
    from flows.commands.deployment_file import deployment_file

    folder = tmp_path / 'my "own" runs'
    folder.mkdir()
    monkeypatch.chdir(folder)
    recipe = yaml.safe_load((REPO / "flows" / "recipes" / "demo.yaml").read_text()) | {"name": "support"}
    Path("support.yaml").write_text(yaml.safe_dump(recipe))
    Path("nightly.yaml").write_text(deployment_file("support.yaml"))
    ((made, flow),) = check_file(Path("nightly.yaml"))
    assert made.name == "support"
    assert made.parameters == {"recipe": str(folder / "support.yaml")}
    assert made.work_pool.job_variables == {"working_dir": str(folder)}
    assert made.tags == ["dpo", f"file:{folder}/nightly.yaml"]
    assert len(fire_times([(made, flow)])["support every-night"]) == 5
    assert '{recipe: "demo"}' in deployment_file("demo")


def test_a_whole_path_as_workspace_needs_no_working_folder() -> None:
    from flows.commands.deploy import check_deployment

    given = {"recipe": "demo", "overrides": ["workspace=/srv/dpo/runs"]}
    check_deployment(deployment(parameters=given, work_pool={"name": "dpo"}))


def test_a_package_in_the_working_folder_that_would_replace_the_flow_is_refused(tmp_path: Path) -> None:
    from flows.commands.deploy import check_deployment

    def check(folder: Path) -> None:
        check_deployment(deployment(work_pool={"name": "dpo", "job_variables": {"working_dir": str(folder)}}))

    check(REPO)
    (tmp_path / "tasks").mkdir()
    check(tmp_path)
    (tmp_path / "tasks" / "__init__.py").touch()
    with pytest.raises(RecipeError, match=f"imports {tmp_path}/tasks/__init__.py in place of the installed"):
        check(tmp_path)


def test_files_of_a_recipe_are_named_by_absolute_paths() -> None:
    from flows.commands.deploy import check_deployment

    def check(sets: list[str], **changes: Any) -> None:
        check_deployment(deployment(parameters={"recipe": "hh-harmless", "overrides": sets}, **changes))

    check(["data.path=/data/pairs.jsonl"])
    check(["data.path=Anthropic/hh-rlhf"])  # of the hub
    check([], schedules=[])  # the trigger names the data
    for sets, file in (
        ([], "data.path: hh_harmless_base_test.jsonl.gz"),
        (["data.path=./pairs"], "data.path: ./pairs"),
        (["data.path=/data/pairs.jsonl", "reward.source=mine.py:score"], "reward.source: mine.py"),
        (["data.path=/data/pairs.jsonl", "gate.baseline=gate.json"], "gate.baseline: gate.json"),
    ):
        with pytest.raises(RecipeError, match=f"nightly.*: recipe hh-harmless: {file} is a relative path"):
            check(sets)


class Server:
    """The client of a server that has one deployment, as it was applied, or none."""

    def __init__(self, deployed: Any = None) -> None:
        from tasks.scheduling.deployments import for_prefect

        self.automations: list[Any] = []
        self.deployed = None
        if deployed is not None:
            made, number = for_prefect(deployed, _flow()), uuid4()
            for trigger in made.triggers:
                trigger.set_deployment_id(number)
                self.automations.append(trigger.as_automation())
            fields = json.loads(made.model_dump_json())
            form = made._parameter_openapi_schema.model_dump(exclude_unset=True)
            self.deployed = SimpleNamespace(
                id=number,
                model_dump=lambda include, **_: {name: fields[name] for name in include},
                tags=made.tags,
                schedules=made.schedules,
                parameter_openapi_schema=json.loads(json.dumps(form)),
                global_concurrency_limit=SimpleNamespace(limit=made.concurrency_limit),
            )

    def read_deployment_by_name(self, _: str) -> Any:
        from prefect.exceptions import ObjectNotFound

        if self.deployed is None:
            raise ObjectNotFound(ValueError())
        return self.deployed


def _flow() -> Any:
    from flows.deployed import deployed

    return deployed


def differences(new: Any, old: Any) -> list[str]:
    from tasks.scheduling.deployments import plan_deployment

    server = Server(old)
    return [str(change) for change in plan_deployment(server, server.automations, new, _flow()).changes]


def test_a_deployment_that_the_server_refuses_is_told_as_that(monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect.deployments.runner import DeploymentApplyError, RunnerDeployment

    from tasks.scheduling.deployments import plan_deployment

    def refuse(_: Any) -> None:
        raise DeploymentApplyError("Work pool dpo has no queue x")

    monkeypatch.setattr(RunnerDeployment, "apply", refuse)
    step = plan_deployment(Server(None), [], deployment(), _flow())
    with pytest.raises(RecipeError, match="refused the deployment nightly: Work pool dpo has no queue x"):
        step.apply()


def test_the_same_is_no_difference_whatever_its_order() -> None:
    other = deployment(tags=[], triggers=[NEW | {"expect": ["a", "b"]}], parameters={"recipe": "demo"})
    assert differences(other, deployment()) == []


def test_differences_are_told_by_schedule_trigger_and_field() -> None:
    day = {"slug": "day", "cron": "0 13 * * *", "timezone": "Europe/Berlin", "active": False}
    new = deployment(
        schedules=[NIGHT | {"cron": "0 3 * * *"}, day],
        triggers=[],
        parameters={"recipe": "frontier"},
        concurrency_limit={"limit": 2, "collision_strategy": "ENQUEUE"},
    )
    old = deployment(schedules=[NIGHT, NIGHT | {"slug": "gone"}])
    assert differences(new, old) == [
        "+ nightly schedule day",
        "- nightly schedule gone",
        "- nightly trigger new",
        "~ nightly concurrency_limit: 1 -> 2",
        '~ nightly parameters: {"recipe": "demo"} -> {"recipe": "frontier"}',
        "~ nightly schedule night cron: 0 1 * * * -> 0 3 * * *",
    ]
    assert differences(deployment(), None) == [
        "+ nightly",
        "+ nightly schedule night",
        "+ nightly trigger new",
    ]


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
    assert "no field deployments.0.shedules (did you mean schedules?)" in done.errors[0]
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
