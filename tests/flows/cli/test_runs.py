"""`dpo runs` with many runs, and `dpo show` of runs in every state."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from dpo_core.errors import RecipeError
from dpo_core.temporary import this_process
from flows.cli.run import show
from tasks.runs.record import RunRecord, new_run, save_run
from tests.scenarios.bad_inputs import dpo
from tests.support.reports.run_reports import decided, make_policies

START = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many") / "runs"
    for number in range(30):
        status = "failed" if number % 10 == 0 else "done"
        at = START + timedelta(hours=number)
        recipe = "nightly" if number < 25 else "weekly"
        save_run(folder, RunRecord(run_id=f"run-{number:02d}", recipe=recipe, status=status, started_at=at))
    return folder


def test_the_newest_are_listed_and_the_rest_is_counted(workspace: Path) -> None:
    lines = dpo("runs", "--workspace", str(workspace)).out.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == [f"run-{n:02d}" for n in range(29, 9, -1)]
    assert lines[-1] == "and 10 older runs: --all lists them"
    everything = dpo("runs", "--all", "--workspace", str(workspace)).out.splitlines()
    assert len(everything) == 30


def test_by_status_and_recipe_and_in_json_without_a_limit_of_its_own(workspace: Path) -> None:
    asked = ("--status", "failed", "--recipe", "nightly", "--workspace", str(workspace), "--json")
    told = json.loads(dpo("runs", *asked).out)
    assert [run["run_id"] for run in told] == ["run-20", "run-10", "run-00"]
    (newest,) = json.loads(dpo("runs", *asked, "--newest", "1").out)
    assert newest["run_id"] == "run-20"
    assert len(json.loads(dpo("runs", "--workspace", str(workspace), "--json").out)) == 30
    refused = dpo("runs", "--status", "finished", "--workspace", str(workspace))
    assert (refused.code, "Name one of running, done" in refused.err) == (2, True)


def test_a_run_that_is_not_finished_is_shown_as_such(tmp_path: Path) -> None:
    record = new_run(tmp_path, "tiny", "dpo run tiny").model_copy(update={"owner": this_process()})
    for status, words in (("running", "Wait for its end"), ("failed", f"--resume {record.run_id}")):
        save_run(tmp_path, record.model_copy(update={"status": status}))
        with pytest.raises(RecipeError, match=f"its status is {status}") as caught:
            show(record.run_id, workspace=str(tmp_path))
        assert words in str(caught.value)


def test_a_finished_run_says_what_came_of_it(tmp_path: Path) -> None:
    command = "dpo run tiny --set seed=1 --set 'data={openings: 9}' --json"
    record = new_run(tmp_path, "tiny", command).model_copy(update={"status": "done"})
    save_run(tmp_path, record)
    report = tmp_path / "runs" / record.run_id / "report.json"
    for text, told in (
        (
            decided(promote=True, policies=make_policies("simpo")).model_dump_json(),
            "promote, gain +0.523 [+0.465 to +0.581], ",
        ),
        (decided(promote=False).model_dump_json(), "do not promote, gain"),
        ('{"decision": 7, "evaluation": []}', ""),
        ("{", ""),
    ):
        report.write_text(text)
        (line,) = dpo("runs", "--workspace", str(tmp_path)).out.splitlines()
        assert line.startswith(record.run_id)
        assert told in line
        assert line.endswith("  --set seed=1 --set 'data={openings: 9}'")
        assert (", trained with simpo  --set" in line) == ("simpo" in text)
