"""Two runs at once on one workspace: every stage is computed once, and both end with their own report."""

import json
import os
import signal
import sqlite3
import subprocess
import time
from collections import Counter
from typing import Any

import pytest
import yaml

from tests.flows.test_alignment import STAGES
from tests.scenarios.faults.whole import Tracked, assert_record_whole, assert_store_clean, left_running
from tests.support.runs.tiny_run import Bench

pytestmark = [pytest.mark.faults, pytest.mark.timeout(2400)]


class Rival:
    """One of the runs."""

    def __init__(self, bench: Bench, name: str, *arguments: str) -> None:
        self.out, self.log = bench.folder / f"{name}.json", bench.folder / f"{name}.log"
        with self.out.open("wb") as out, self.log.open("wb") as log:
            self.process = subprocess.Popen(
                bench.command("run", str(bench.recipe), "--json", *arguments),
                env=bench.environment(),
                cwd=bench.folder,
                stdout=out,
                stderr=log,
            )

    def said(self) -> str:
        return self.log.read_text()

    def report(self) -> dict[str, Any]:
        """What it reports when it has ended."""
        assert self.process.wait(timeout=1200) == 0, self.said()
        report: dict[str, Any] = json.loads(self.out.read_text())
        return report


@pytest.fixture
def empty(bench: Bench, request: pytest.FixtureRequest) -> Bench:
    """The tiny recipe with nothing in its workspace, not even a database."""
    own = Bench(bench.folder.with_name(request.node.name))
    own.folder.mkdir()
    recipe = yaml.safe_load(bench.recipe.read_text())
    recipe["workspace"] = str(own.workspace)
    own.recipe.write_text(yaml.safe_dump(recipe))
    return own


def runs_of(bench: Bench) -> int:
    return len(list((bench.workspace / "runs").iterdir()))


def ran(*reports: dict[str, Any]) -> Counter[str]:
    """How often each stage was computed."""
    return Counter(s["name"] for report in reports for s in report["stages"] if s["state"] == "ran")


def assert_sound(bench: Bench, rivals: list[Rival], runs: int) -> Tracked:
    for rival in rivals:
        assert "refused" not in rival.said()
        assert "does not answer" not in rival.said()
        assert "Traceback" not in rival.said()
    assert_store_clean(bench.workspace)
    assert_record_whole(bench.workspace, runs)
    tracked = Tracked(bench.workspace)
    tracked.assert_sound()
    assert len(tracked.parents) == runs
    return tracked


def test_the_same_recipe_twice_at_the_same_moment(empty, finished):
    reference, whole = finished
    rivals = [Rival(empty, "a"), Rival(empty, "b")]
    reports = [rival.report() for rival in rivals]
    assert ran(*reports) == dict.fromkeys(STAGES, 1)
    assert empty.index() == reference.index()
    assert [report["evaluation"] for report in reports] == [whole["evaluation"]] * 2
    assert len({report["run"]["name"] for report in reports}) == 2
    tracked = assert_sound(empty, rivals, 2)
    assert sorted(run.info.run_name for run in tracked.children) == sorted(STAGES)
    # One version a run, and the alias at the one that registered last.
    by_run = {version.run_id: int(version.version) for version in tracked.versions}
    assert by_run.keys() == {report["run"]["mlflow_run_id"] for report in reports}
    assert sorted(by_run.values()) == [1, 2]
    assert {version.tags["dpo.weights_uri"] for version in tracked.versions} == {reports[0]["model"]["uri"]}
    assert {report["model"]["version"] for report in reports} == {"1", "2"}
    alias = tracked.client.get_model_version_by_alias("dpo-tiny", "challenger")
    assert alias.version in (1, 2, "1", "2")
    assert not left_running(empty.workspace)


def test_two_recipes_share_what_they_have_in_common(finished):
    reference, whole = finished
    own = reference.copy("two-recipes")
    before = runs_of(own)
    for path in (own.workspace / "store" / "index").glob("*/*.json"):
        if path.parent.name in {"cache-reference", "train-dpo", "evaluate"}:
            path.unlink()
    rivals = [Rival(own, "a"), Rival(own, "b", "--set", "policies.DPO.optim.learning_rate=3e-5")]
    reports = [rival.report() for rival in rivals]
    assert ran(*reports) == {"cache-reference": 1, "train-dpo DPO": 2, "evaluate": 2}
    assert reports[0]["evaluation"] == whole["evaluation"]
    assert reports[1]["evaluation"] != whole["evaluation"]
    assert {k: own.index()[k] for k in reference.index()} == reference.index()
    assert_sound(own, rivals, before + 2)


def test_one_is_killed_while_the_other_waits_for_its_stage(finished):
    reference, whole = finished
    own = reference.copy("killed-rival")
    before = runs_of(own)
    for path in (own.workspace / "store" / "index" / "train-dpo").glob("*.json"):
        path.unlink()
    first = Rival(own, "a")
    _until(first, "train-dpo DPO: running")
    time.sleep(2)  # not in the middle of a write to MLflow, which nobody could then read
    os.kill(first.process.pid, signal.SIGSTOP)  # it holds its lock until the other has come so far
    second = Rival(own, "b")
    _until(second, f"is in progress: process {first.process.pid}")
    os.kill(first.process.pid, signal.SIGKILL)
    first.process.wait()
    report = second.report()
    assert "train-dpo DPO" in ran(report)
    assert report["evaluation"] == whole["evaluation"]
    assert own.index() == reference.index()
    resumed = Rival(own, "c", "--resume")
    assert ran(resumed.report()) == {}
    tracked = assert_sound(own, [second, resumed], before + 2)
    trained = [run for run in tracked.children if run.info.run_name == "train-dpo DPO"]
    curves = [tracked.curves(run)["loss"] for run in trained]
    assert [[step for step, _ in curve] for curve in curves] == [[1, 2, 3]] * 3
    assert curves[0] == curves[1] == curves[2]
    assert not left_running(own.workspace)


def test_a_database_that_is_locked_for_a_minute_costs_nothing_but_time(finished):
    reference, whole = finished
    own = reference.copy("locked")
    for stage in ("train-dpo", "evaluate"):
        for path in (own.workspace / "store" / "index" / stage).glob("*.json"):
            path.unlink()
    rival = Rival(own, "a")
    _until(rival, "train-dpo DPO: running")
    lock = sqlite3.connect(own.workspace / "mlflow.db", timeout=30)
    lock.execute("begin immediate")
    time.sleep(60)
    lock.rollback()
    lock.close()
    assert rival.report()["evaluation"] == whole["evaluation"]
    assert "refused" not in rival.said()
    tracked = Tracked(own.workspace)
    tracked.assert_sound()
    curves = [tracked.curves(run)["loss"] for run in tracked.children if run.info.run_name == "train-dpo DPO"]
    assert curves[0] == curves[1]
    assert_store_clean(own.workspace)


def _until(rival: Rival, text: str, seconds: float = 900) -> None:
    limit = time.monotonic() + seconds
    while text not in rival.said():
        assert rival.process.poll() is None, rival.said()
        assert time.monotonic() < limit, rival.said()
        time.sleep(0.05)
