"""Records of killed runs: their displayed status, and which process writes their end."""

import json
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest

from dpo_core.temporary import Owner, this_process
from tasks.recipe.sections import TrackingConfig
from tasks.runs.record import RunRecord, close_abandoned, find_run, list_runs, save_run
from tasks.tracking.tracker import Tracker
from tests.support.runs.tracked import RECIPE, client


@pytest.fixture(scope="module")
def dead() -> Owner:
    """A process that has ended."""
    process = subprocess.Popen(["true"])
    owner = this_process().model_copy(update={"pid": process.pid})
    process.wait()
    return owner


def record(owner: Owner | None, name: str, **more: str) -> RunRecord:
    now = datetime.now(UTC)
    return RunRecord(run_id=name, recipe="tiny", started_at=now, owner=owner, **more)


def status(workspace: Path, name: str) -> str:
    return str(json.loads((workspace / "runs" / name / "run.json").read_text())["status"])


def test_a_process_that_ended_or_lost_its_number_to_another_is_gone(dead: Owner) -> None:
    me = this_process()
    assert not me.is_gone()
    assert dead.is_gone()
    assert me.model_copy(update={"born": me.born - 100}).is_gone()
    assert not dead.model_copy(update={"host": "elsewhere"}).is_gone(), "of others nobody knows"


def test_a_zombie_is_gone() -> None:
    process = subprocess.Popen(["true"], stdout=subprocess.PIPE)
    assert process.stdout
    process.stdout.read()  # it has ended, and nobody has asked how
    owner = this_process().model_copy(update={"pid": process.pid})
    try:
        for _ in range(100):
            if owner.is_gone():
                break
        assert owner.is_gone()
    finally:
        process.wait()


def test_a_killed_run_is_listed_as_stopped_and_can_be_resumed(tmp_path: Path, dead: Owner) -> None:
    save_run(tmp_path, record(dead, "killed"))
    save_run(tmp_path, record(this_process(), "alive"))
    save_run(tmp_path, record(None, "of-an-older-version"))
    save_run(tmp_path, record(dead, "done", status="done"))
    statuses = {run.run_id: run.status for run in list_runs(tmp_path)}
    assert statuses == {
        "killed": "stopped",
        "alive": "running",
        "of-an-older-version": "running",
        "done": "done",
    }
    run = find_run(tmp_path, "killed", "tiny")
    assert (run.status, run.error) == ("stopped", "its process was killed")
    assert status(tmp_path, "killed") == "running", "who lists changes nothing"


def test_the_next_run_writes_the_end_of_a_killed_one(
    tmp_path: Path, dead: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    at_work = []  # else their contexts would be closed, and their runs with them

    def begun(name: str, owner: Owner) -> tuple[Tracker, list[str]]:
        tracker = Tracker(TrackingConfig(), tmp_path)
        save = lambda mlflow_id: save_run(tmp_path, record(owner, name, mlflow_run_id=mlflow_id))  # noqa: E731
        tracker.start_parent(name, recipe=RECIPE, opened=save)
        with tracker.child("validate") as ended:
            pass
        at_work.append(tracker.child("train"))
        return tracker, [tracker.run_id, str(at_work[-1].__enter__().run_id), str(ended.run_id)]

    killed, of_killed = begun("killed", dead)
    _, of_alive = begun("alive", this_process())
    save_run(tmp_path, record(dead, "tracked-elsewhere", mlflow_run_id="0" * 32))
    close_abandoned(tmp_path, killed)

    api = client(killed)

    def states(ids: list[str]) -> list[str]:
        return [api.get_run(run_id).info.status for run_id in ids]

    assert states(of_killed) == ["KILLED", "KILLED", "FINISHED"]
    assert states(of_alive) == ["RUNNING", "RUNNING", "FINISHED"]
    assert api.get_run(of_killed[0]).data.tags["dpo.error"] == "its process was killed"
    assert status(tmp_path, "killed") == "stopped"
    assert status(tmp_path, "alive") == "running"
    assert status(tmp_path, "tracked-elsewhere") == "running", "left for a run that finds its MLflow run"
