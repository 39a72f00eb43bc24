"""The clock is set back, by an hour or a year: nothing that is alive is taken for old, nothing new for old.

A library that is loaded before the C library sets the clock of the commands alone, torch's processes and
MLflow included. What counts seconds since the start of the machine goes on, as when a machine's clock is set.
"""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from tests.flows.test_alignment import STAGES
from tests.scenarios.faults.whole import Tracked, assert_store_clean, forget_from, left_running
from tests.support.runs.tiny_run import Bench

pytestmark = [pytest.mark.faults, pytest.mark.timeout(2400)]

HOUR, YEAR = 3600, 365 * 86400


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler to make a clock with")
    made = tmp_path_factory.mktemp("clock") / "clock.so"
    source = Path(__file__).with_name("clock.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O2", "-o", str(made), str(source), "-ldl"], check=True)
    return made


def set_back(library: Path, seconds: int) -> dict[str, str]:
    """What a command needs in its environment to live in the past."""
    return {"LD_PRELOAD": str(library), "CLOCK_OFFSET": str(-seconds)}


def dpo(bench: Bench, *arguments: str, clock: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        bench.command(*arguments),
        env=bench.environment() | clock,
        cwd=bench.folder,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def names(bench: Bench) -> list[str]:
    """The runs as `dpo runs` lists them, newest first."""
    done = dpo(bench, "runs", "--workspace", str(bench.workspace), "--json", clock={})
    return [record["run_id"] for record in json.loads(done.stdout)]


def report_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


@pytest.mark.parametrize("seconds", [HOUR, YEAR])
def test_what_was_made_before_is_found_and_runs_keep_their_order(finished, library, seconds):
    reference, _ = finished
    own = reference.copy(f"clock-{seconds}")
    before, index = names(own), own.index()
    reports = [
        report_of(dpo(own, "run", str(own.recipe), "--json", clock=clock))
        for clock in (set_back(library, seconds), {})
    ]
    for report in reports:
        assert set(own.states(report).values()) == {"cached"}
        assert 0 < report["run"]["seconds"] < 600
    told = [report["run"]["name"] for report in reports]
    assert told[0] < before[0], "its clock was really set back"
    assert names(own) == [*told[::-1], *before], "in the order in which they began"
    assert own.index() == index
    assert_store_clean(own.workspace)


def test_a_run_that_is_killed_goes_on_in_an_earlier_year(finished, library):
    """The newest unfinished run is the last that began; its runs in MLflow end after their start."""
    reference, whole = finished
    own = reference.copy("clock-resumed")
    forget_from(own, "train-dpo DPO")
    for clock in ({}, set_back(library, YEAR)):
        _killed_in_training(own, clock)
    last, first = names(own)[:2]
    assert last < first
    work = own.workspace / "work" / "train-dpo"
    assert list(work.glob("*/checkpoints/step-*"))
    report = report_of(
        dpo(own, "run", str(own.recipe), "--json", "--resume", clock=set_back(library, YEAR + 30 * 86400))
    )
    assert report["run"]["name"] == last
    assert report["evaluation"] == whole["evaluation"]
    assert own.index() == reference.index()
    assert_store_clean(own.workspace)
    assert not left_running(own.workspace)
    client = MlflowClient(f"sqlite:///{own.workspace / 'mlflow.db'}")
    tracked = Tracked(own.workspace)
    parent = client.get_run(report["run"]["mlflow_run_id"])
    mine = [r for r in tracked.children if r.data.tags["mlflow.parentRunId"] == parent.info.run_id]
    assert [r.info.run_name for r in mine if r.info.status != "FINISHED"] == []
    assert {r.info.run_name for r in mine} == set(STAGES[STAGES.index("train-dpo DPO") :])
    for run in (parent, *mine):
        assert run.info.end_time >= run.info.start_time
    trained = next(r for r in mine if r.info.run_name == "train-dpo DPO")
    assert [step for step, _ in tracked.curves(trained)["loss"]] == [1, 2, 3]


def _killed_in_training(bench: Bench, clock: dict[str, str]) -> int:
    """A run that is killed between two checkpoints; its number."""
    work, log = bench.workspace / "work" / "train-dpo", bench.folder / "killed.log"
    with log.open("wb") as output:
        flow = subprocess.Popen(
            bench.command("run", str(bench.recipe)),
            env=bench.environment() | clock,
            cwd=bench.folder,
            stdout=output,
            stderr=output,
        )
    limit = time.monotonic() + 900
    while not ("train-dpo DPO: running" in log.read_text() and any(work.glob("*/checkpoints/step-*"))):
        assert flow.poll() is None, log.read_text()
        assert time.monotonic() < limit, log.read_text()
        time.sleep(0.02)
    os.kill(flow.pid, signal.SIGKILL)
    flow.wait()
    return flow.pid
