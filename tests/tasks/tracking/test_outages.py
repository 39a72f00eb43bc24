"""MLflow away, full, locked or damaged: a run goes on, and what MLflow lacks is saved and sent later.

A database whose disk is full answers questions and refuses every write; triggers make it do so.
"""

import contextlib
import functools
import logging
import shutil
import sqlite3
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests

from dpo_core.errors import StageFailed
from tasks.recipe.sections import TrackingConfig
from tasks.tracking.connection import Connection
from tasks.tracking.registry import register_model
from tasks.tracking.tracker import PATIENCE, Tracker
from tests.support.runs.stored import python
from tests.support.runs.tracked import RECIPE, children, client, lines, points
from tests.support.sites.mlflow_server import Server

TABLES = (
    "runs", "tags", "params", "metrics", "latest_metrics", "inputs", "datasets", "registered_model_aliases",
)  # fmt: skip


@contextmanager
def full_disk(workspace: Path) -> Iterator[None]:
    """Nothing can be written to the tracking database inside."""
    failure = "SELECT RAISE(FAIL, 'database or disk is full')"
    with sqlite3.connect(workspace / "mlflow.db") as database:
        for table in TABLES:
            for how in ("INSERT", "UPDATE"):
                database.execute(f"CREATE TRIGGER {table}_{how} BEFORE {how} ON {table} BEGIN {failure}; END")
    yield
    with sqlite3.connect(workspace / "mlflow.db") as database:
        for table in TABLES:
            for how in ("INSERT", "UPDATE"):
                database.execute(f"DROP TRIGGER {table}_{how}")


@pytest.fixture
def workspace(tracking_database: Path, tmp_path: Path) -> Path:
    (tmp_path / "w").mkdir()
    shutil.copyfile(tracking_database, tmp_path / "w" / "mlflow.db")
    return tmp_path / "w"


def opened(workspace: Path, run_id: str | None = None) -> Tracker:
    tracker = Tracker(TrackingConfig(uri=f"sqlite:///{workspace}/mlflow.db"), workspace)
    tracker.start_parent("run", recipe=RECIPE, run_id=run_id)
    return tracker


def refused_stage(tracker: Tracker, workspace: Path) -> None:
    """A stage whose scratch folder is gone when it has ended, as that of a committed one."""
    scratch = workspace / "scratch"
    scratch.mkdir()
    with tracker.child("train", tags={"dpo.config_digest": "d"}) as run:
        run.params({"beta": 0.1})
        (scratch / "metrics.jsonl").write_text(lines(range(40)))
        (scratch / "train.log").write_text("step 1")
        run.metrics_from_jsonl(scratch / "metrics.jsonl")
        run.artifact(scratch / "train.log", "logs")
        run.dataset("pairs", "d" * 64, 3, "/data/pairs", "training")
        run.metrics({"cost/seconds": 2.0})
        run.tag("dpo.artifact_sha256", "a" * 64)
        assert run.run_id is None
        shutil.rmtree(scratch)


def assert_sent(tracker: Tracker) -> None:
    """What `refused_stage` wrote is there, each thing once."""
    (child,) = children(tracker)
    assert child.info.status == "FINISHED"
    assert child.data.params == {"beta": "0.1"}
    assert child.data.tags["dpo.artifact_sha256"] == "a" * 64
    history = client(tracker).get_metric_history(child.info.run_id, "loss")
    assert sorted((m.step, m.value) for m in history) == [(s, s / 8) for s in range(40)]
    assert child.data.metrics["cost/seconds"] == 2.0
    assert [i.dataset.name for i in child.inputs.dataset_inputs] == ["pairs"]
    assert [i.path for i in client(tracker).list_artifacts(child.info.run_id, "logs")] == ["logs/train.log"]


@pytest.mark.parametrize("next_run", ["resumed", "another"])
def test_the_next_run_sends_what_mlflow_lacks(
    workspace: Path, next_run: str, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = opened(workspace)
    with full_disk(workspace):
        start = time.monotonic()
        refused_stage(tracker, workspace)
        tracker.parent.tag("dpo.error", "the disk is full")
        tracker.finish_parent("FAILED")
        assert time.monotonic() - start < 25, "waiting makes no room on a disk"
    assert "--resume run, sends the writes saved in" in caplog.text
    assert not children(tracker)

    again = opened(workspace, tracker.run_id if next_run == "resumed" else None)
    assert_sent(tracker)
    status = client(again).get_run(tracker.run_id).info.status
    assert status == ("RUNNING" if next_run == "resumed" else "FAILED")
    assert not (workspace / "tracking_outbox").exists()
    again.finish_parent()


def test_a_run_that_finds_mlflow_back_sends_it_once_and_keeps_nothing(
    workspace: Path, tmp_path: Path
) -> None:
    tracker = opened(workspace)
    with full_disk(workspace):
        refused_stage(tracker, workspace)
        shutil.copytree(workspace / "tracking_outbox", tmp_path / "copy")  # safe from a kill
    tracker.finish_parent()
    assert_sent(tracker)
    assert not (workspace / "tracking_outbox").exists()
    shutil.copytree(tmp_path / "copy", workspace / "tracking_outbox")
    opened(workspace).finish_parent()
    assert_sent(tracker)


def test_a_stage_that_mlflow_has_half_of_is_completed(workspace: Path) -> None:
    tracker = opened(workspace)
    with tracker.child("train") as run:
        broken = full_disk(workspace)
        broken.__enter__()
        run.tag("late", "yes")
    tracker.finish_parent("KILLED")
    broken.__exit__(None, None, None)
    opened(workspace).finish_parent()
    (child,) = children(tracker)
    assert (child.data.tags["late"], child.info.status) == ("yes", "FINISHED")


@pytest.mark.parametrize("trouble", ["damaged", "of another MLflow"])
def test_saved_writes_that_cannot_be_sent(
    workspace: Path, trouble: str, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = opened(workspace)
    with full_disk(workspace):
        refused_stage(tracker, workspace)
        tracker.finish_parent("KILLED")
    (path,) = workspace.glob("tracking_outbox/*/train.json")
    if trouble == "damaged":
        path.write_text(path.read_text()[:200])
        opened(workspace).finish_parent()
        assert f"{path} is damaged" in caplog.text
        assert list(path.parent.glob("files/*/train.log")), "which a person may upload"
        assert not children(tracker)
    else:
        other = Tracker(TrackingConfig(uri=f"sqlite:///{workspace}/other.db"), workspace)
        shutil.copyfile(workspace / "mlflow.db", workspace / "other.db")
        other.start_parent("run", recipe=RECIPE)
        assert path.exists()


@pytest.mark.parametrize(("status", "given_up"), [(413, True), (403, True), (429, False), (503, False)])
def test_an_upload_that_is_refused_is_no_outage(workspace: Path, status: int, given_up: bool) -> None:
    response = requests.Response()
    response.status_code = status

    def send() -> None:
        response.raise_for_status()

    assert Connection(f"sqlite:///{workspace}/mlflow.db", workspace).attempt("page", send) == given_up


def test_one_blocked_write_does_not_hold_up_the_other_runs(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = opened(workspace)
    with monkeypatch.context() as away:
        away.setattr(tracker.connection, "attempt", lambda *_, **__: False)
        with tracker.child("prepare") as blocked, tracker.child("train") as run:
            run.tag("late", "yes")
    monkeypatch.setattr(blocked, "send", lambda **_: False)
    monkeypatch.setitem(PATIENCE, "FINISHED", 1.0)
    tracker.finish_parent()
    (child,) = children(tracker)
    assert (child.data.tags["late"], child.info.status) == ("yes", "FINISHED")


def test_another_run_leaves_alone_what_a_run_at_work_has_saved(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = opened(workspace)
    with monkeypatch.context() as away:
        away.setattr(tracker.connection, "attempt", lambda *_, **__: False)
        with tracker.child("train"):
            pass
    opened(workspace)
    assert list(workspace.glob("tracking_outbox/*/train.json"))
    assert not children(tracker)
    tracker.finish_parent()
    assert children(tracker)


def test_a_resume_without_mlflow_removes_nothing(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = opened(workspace)
    with full_disk(workspace):
        tracker.parent.tag("dpo.error", "the disk is full")
        tracker.finish_parent("FAILED")

    def away(*_: object) -> None:
        raise StageFailed("MLflow does not answer", "Start it")

    monkeypatch.setattr(Tracker, "ask", away)
    with pytest.raises(StageFailed):
        opened(workspace, tracker.run_id)
    assert list(workspace.glob("tracking_outbox/*/parent.json"))


def test_a_stage_of_a_deleted_experiment_is_given_up(workspace: Path) -> None:
    tracker = opened(workspace)
    client(tracker).delete_experiment(tracker.experiment_id)
    with tracker.child("train") as run:
        run.tag("late", "yes")
    tracker.finish_parent()
    assert run.complete
    assert not (workspace / "tracking_outbox").exists()


def test_a_run_starts_without_the_artifact_store(workspace: Path, caplog: pytest.LogCaptureFixture) -> None:
    (workspace / "mlartifacts").touch()  # no folder can be made there
    tracker = opened(workspace)
    assert client(tracker).get_run(tracker.run_id).data.params["seed"] == "1"
    assert "recipe.yaml of the parent run" in caplog.text


def test_writes_that_could_not_be_saved_are_not_promised(
    workspace: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = opened(workspace)
    (workspace / "tracking_outbox").touch()  # no folder can be made there
    with full_disk(workspace):
        with pytest.raises(StageFailed, match=f"{workspace} is full"):
            register_model(tracker, "policy", str(workspace))
        tracker.parent.tag("dpo.error", "the disk is full")
        tracker.finish_parent("FAILED")
    assert "these writes are lost" in caplog.text
    assert "sends the writes saved" not in caplog.text


MAKE = "import sys; from tasks.tracking.connection import make_database; make_database(sys.argv[1])"
HOLD = """
import sqlite3, sys, time
database = sqlite3.connect(sys.argv[1])
database.execute("begin exclusive")
print("held", flush=True)
time.sleep(2)
database.rollback()
"""


@pytest.mark.slow
def test_a_database_is_made_by_one_of_two_processes(tmp_path: Path) -> None:
    for left in (
        ".mlflow.db.new",
        ".mlflow.db.new-journal",
    ):  # by a process that was killed while it made one
        (tmp_path / left).write_bytes(b"SQLite format 3")
    makers = [python(MAKE, f"sqlite:///{tmp_path / 'mlflow.db'}", stderr=subprocess.PIPE) for _ in range(2)]
    errors = [maker.communicate()[1] for maker in makers]
    assert [maker.returncode for maker in makers] == [0, 0], errors
    assert "".join(errors).count("Creating initial MLflow database tables") == 1
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        assert database.execute("pragma integrity_check").fetchall() == [("ok",)]
    assert not list(tmp_path.glob(".mlflow.db.new*"))


def test_a_locked_database_is_waited_for(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by a process that was stopped in the middle of a write: not even readers are answered."""
    # SQLite's own patience is 5 s.
    monkeypatch.setattr("sqlite3.dbapi2.connect", functools.partial(sqlite3.dbapi2.connect, timeout=0.5))
    holder = python(HOLD, workspace / "mlflow.db")
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    assert opened(workspace).run_id
    assert holder.wait() == 0


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    (tmp_path / "server").mkdir()
    server = Server(tmp_path / "server")
    server.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    yield server
    server.stop()


@pytest.mark.slow
def test_a_server_that_goes_away_costs_only_delay(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "tasks.tracking.connection")
    tracker = Tracker(TrackingConfig(), tmp_path)
    tracker.start_parent("run", recipe=RECIPE)
    version = register_on_server(tracker, tmp_path)
    log, offset, slowest = tmp_path / "metrics.jsonl", 0, 0.0
    with tracker.child("train") as run:
        for start in range(0, 400, 20):
            if start == 100:
                server.stop()
            if start == 300:
                server.start()
            with log.open("a") as file:
                file.write(lines(range(start, start + 20)))
            began = time.monotonic()
            offset = run.metrics_from_jsonl(log, offset)
            run.metrics({"eval": float(start)}, step=start)
            slowest = max(slowest, time.monotonic() - began)
    server.stop()
    # The next stage begins and ends while nobody answers; the server comes back before the run ends.
    restart = threading.Thread(target=lambda: (time.sleep(3), server.start()))
    restart.start()
    with tracker.child("evaluate") as evaluate:
        evaluate.metrics({"win_rate": 0.75}, step=1)
        evaluate.params({"judge": "vader"})
        assert evaluate.run_id is None
    tracker.finish_parent()
    restart.join()

    for key, value in (("loss", 1 / 8), ("rewards/chosen", -1.0)):
        assert points(tracker, run, key) == sorted((step, step * value) for step in range(400))
    assert points(tracker, run, "eval") == [(step, float(step)) for step in range(0, 400, 20)]
    assert points(tracker, evaluate, "win_rate") == [(1, 0.75)]
    assert {c.info.run_name: c.info.status for c in children(tracker)} == {
        "train": "FINISHED",
        "evaluate": "FINISHED",
    }
    assert client(tracker).get_run(tracker.run_id).info.status == "FINISHED"
    assert caplog.text.count("does not answer") == caplog.text.count("answers again") == 2
    assert f"{server.uri} refused" not in caplog.text  # urllib3 says "Connection refused"
    assert slowest < 5, f"a call held the training for {slowest:.1f} s"

    server.stop()
    gone = Tracker(TrackingConfig(), tmp_path)
    gone.connection, gone.run_id, gone.parent = tracker.connection, tracker.run_id, tracker.parent
    monkeypatch.setitem(PATIENCE, "FINISHED", 1.0)
    with pytest.raises(KeyboardInterrupt), gone.child("judge"):
        raise KeyboardInterrupt
    gone.finish_parent()
    assert "did not accept all writes" in caplog.text
    assert version == "1"


def register_on_server(tracker: Tracker, tmp_path: Path) -> str:
    (tmp_path / "model").mkdir()
    version = register_model(tracker, "policy", str(tmp_path / "model"))
    registered = client(tracker).get_model_version_by_alias("policy", "challenger")
    assert (str(registered.version), registered.run_id) == (version, tracker.run_id)
    assert registered.tags["dpo.weights_uri"] == (tmp_path / "model").as_uri()
    return version
