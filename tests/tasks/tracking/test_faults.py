"""Tracking when processes are killed between writes, clocks are set back, or the database is locked."""

import contextlib
import shutil
import signal
import sqlite3
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tasks.recipe.sections import TrackingConfig
from tasks.store.manifest import Manifest
from tasks.store.store import ArtifactInfo, Store
from tasks.tracking import mlflow_run as tracking_run
from tasks.tracking import registry
from tasks.tracking.registry import register_model
from tasks.tracking.tracker import Tracker
from tests.support.runs.stored import CONFIG, KEY, python, write
from tests.support.runs.tracked import RECIPE, children, client, lines, points

MAKE = """
import sys
from tasks.tracking.database import make_database
make_database(sys.argv[1])
"""


HOLD = """
import sqlite3, sys, time
database = sqlite3.connect(sys.argv[1])
database.execute("begin exclusive")
print("held", flush=True)
time.sleep(8)  # SQLite's own patience is 5 s
database.rollback()
"""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One database for the module, made by two at once where a third was killed while it made it."""
    folder = tmp_path_factory.mktemp("workspace")
    for left in (".mlflow.db.new", ".mlflow.db.new-journal"):
        (folder / left).write_bytes(b"SQLite format 3")
    makers = [python(MAKE, f"sqlite:///{folder / 'mlflow.db'}", stderr=subprocess.PIPE) for _ in range(2)]
    errors = [maker.communicate()[1] for maker in makers]
    assert [maker.returncode for maker in makers] == [0, 0], errors
    assert "".join(errors).count("Creating initial MLflow database tables") == 1
    return folder


@pytest.fixture
def tracker(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Tracker:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return opened(workspace, f"run-{time.monotonic_ns()}")


def opened(workspace: Path, name: str, run_id: str | None = None, *, reopen: bool = False) -> Tracker:
    tracker = Tracker(TrackingConfig(), workspace)
    tracker.start_parent(name, recipe=RECIPE, run_id=run_id, reopen=reopen, tags={"dpo.run": name})
    return tracker


def name_of(tracker: Tracker) -> str:
    return str(client(tracker).get_run(tracker.run_id).info.run_name)


def stored(workspace: Path) -> Manifest:
    store = Store(workspace)
    folder = write(store.begin("train", KEY) / "out", {"metrics.jsonl": lines(range(1, 5)).encode()})
    return store.commit("train", KEY, folder, ArtifactInfo("model", 1, CONFIG))


def test_a_database_is_made_by_one_of_two_and_nothing_half_made_is_left(
    tracker: Tracker, workspace: Path
) -> None:
    with contextlib.closing(sqlite3.connect(workspace / "mlflow.db")) as database:
        assert database.execute("pragma integrity_check").fetchall() == [("ok",)]
    assert client(tracker).get_run(tracker.run_id).info.status == "RUNNING"
    assert not list(workspace.glob(".mlflow.db.new*"))


def test_a_parent_whose_id_nobody_noted_is_found_again(tracker: Tracker, workspace: Path) -> None:
    with tracker.child("train", tags={"dpo.run": name_of(tracker)}):
        again = opened(workspace, name_of(tracker), reopen=True)
    assert again.run_id == tracker.run_id
    assert opened(workspace, f"{name_of(tracker)}-2", reopen=True).run_id != tracker.run_id
    # Of another workspace that shares the server, and starts a run of this name in the same second.
    assert opened(workspace, name_of(tracker)).run_id != tracker.run_id


def test_a_stage_that_was_killed_after_it_had_stored_is_ended(tracker: Tracker, workspace: Path) -> None:
    artifact = stored(workspace)
    child = tracker.child("train", tags={"dpo.run": name_of(tracker)}).__enter__()
    curve = workspace / "curve.jsonl"
    curve.write_text(lines(range(1, 3)))
    child.metrics_from_jsonl(curve)
    again = opened(workspace, name_of(tracker), tracker.run_id)
    again.close_stage("train", artifact)
    again.close_stage("never reopen", artifact)
    (run,) = children(again)
    assert (run.info.run_id, run.info.status) == (child.run_id, "FINISHED")
    assert run.data.tags["dpo.artifact_sha256"] == artifact.sha256
    assert points(again, child, "loss") == [(s, s / 8) for s in range(1, 5)], "no point twice, none missing"


def test_no_run_ends_before_it_began(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch, workspace: Path
) -> None:
    with tracker.child("train"):
        monkeypatch.setattr(tracking_run, "now_ms", lambda: int(1000 * (time.time() - 3600)))
    tracker.finish_parent()
    for run in (*children(tracker), client(tracker).get_run(tracker.run_id)):
        assert run.info.status == "FINISHED"
        assert run.info.end_time >= run.info.start_time


def test_what_a_kill_left_of_a_registration_is_used_or_removed(
    tracker: Tracker, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = client(tracker)
    uri = (workspace / "model").as_uri()
    half = api.create_logged_model(
        tracker.experiment_id, "dpo-left", tracker.run_id, tags={"dpo.weights_uri": uri}
    )

    def logged() -> list[str]:
        models = api.search_logged_models([tracker.experiment_id], f"source_run_id = '{tracker.run_id}'")
        return [model.model_id for model in models]

    def killed(*_: object) -> str:
        raise SystemExit

    with monkeypatch.context() as before_the_version, pytest.raises(SystemExit):  # noqa: PT012
        before_the_version.setattr(registry, "_new_version", killed)
        register_model(tracker, "dpo-left", uri)
    (left,) = logged()
    assert left != half.model_id, "it was never made ready"
    assert register_model(tracker, "dpo-left", uri) == "1"
    assert logged() == [left]


def test_a_database_that_others_write_to_is_waited_for(tracker: Tracker, workspace: Path) -> None:
    """Readers are answered all the while, so that it does not look like an outage."""
    import sqlalchemy

    engine = sqlalchemy.create_engine(f"sqlite:///{workspace / 'mlflow.db'}", connect_args={"timeout": 0.01})

    def write_now() -> None:
        with engine.connect() as connection:
            connection.exec_driver_sql("begin immediate")

    with contextlib.closing(sqlite3.connect(workspace / "mlflow.db")) as other:
        other.execute("begin immediate")
        for _ in range(8):  # more often than a write that can never be taken is tried
            assert not tracker._outbox.attempt("a write", write_now, force=True)
    assert tracker._outbox.attempt("a write", write_now, force=True)


def test_a_signal_amid_a_write_raises_after_it_and_leaves_no_lock(tracker: Tracker, workspace: Path) -> None:
    from sqlalchemy import event

    engine = tracker._client._tracking_client.store.engine
    signals: list[str] = []

    def interrupt(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if "INSERT INTO metrics" in statement and not signals:
            signals.append(statement)
            signal.raise_signal(signal.SIGINT)

    event.listen(engine, "after_cursor_execute", interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt) as stop:
            tracker.parent.metrics({"loss": 0.5}, 7)
    finally:
        signal.signal(signal.SIGINT, before)
        event.remove(engine, "after_cursor_execute", interrupt)
    assert signals
    database = sqlite3.connect(workspace / "mlflow.db", timeout=0, isolation_level=None)
    with contextlib.closing(database):
        database.execute("begin exclusive")  # while the error lives
        database.execute("rollback")
    assert stop.value is not None
    assert [m.value for m in client(tracker).get_metric_history(tracker.run_id, "loss")] == [0.5]


def test_a_database_that_is_held_when_a_run_starts_is_waited_for(
    tracker: Tracker, workspace: Path, tmp_path: Path
) -> None:
    """As by a process that was stopped in the middle of a write: not even readers are answered."""
    shutil.copy(workspace / "mlflow.db", tmp_path)  # MLflow keeps files open that it has seen
    holder = python(HOLD, tmp_path / "mlflow.db")
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    assert opened(tmp_path, "patient").run_id
    assert holder.wait() == 0
