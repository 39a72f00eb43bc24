"""Writes that MLflow does not accept are saved to disk, and the next run of the workspace sends them.

A database whose disk is full answers questions and refuses every write; triggers make it do so.
"""

import json
import shutil
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dpo_core.errors import StageFailed
from tasks.recipe.sections import TrackingConfig
from tasks.tracking.registry import register_model
from tasks.tracking.tracker import Tracker
from tests.support.runs.tracked import RECIPE, children, client, lines

TABLES = (
    "runs",
    "tags",
    "params",
    "metrics",
    "latest_metrics",
    "inputs",
    "datasets",
    "registered_model_aliases",
)


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
        assert run.metrics_from_jsonl(scratch / "metrics.jsonl") == 0
        run.artifact(scratch / "train.log", "logs")
        run.dataset("pairs", "d" * 64, 3, "/data/pairs", "training")
        run.metrics({"cost/seconds": 2.0})
        run.tag("dpo.artifact_sha256", "a" * 64)
        shutil.rmtree(scratch)


def assert_told(tracker: Tracker) -> None:
    """What `refused_stage` wrote is there, each thing once."""
    (child,) = [c for c in children(tracker) if c.data.tags["dpo.stage"] == "train"]
    assert child.info.status == "FINISHED"
    assert child.data.params == {"beta": "0.1"}
    assert child.data.tags["dpo.artifact_sha256"] == "a" * 64
    history = client(tracker).get_metric_history(child.info.run_id, "loss")
    assert sorted((m.step, m.value) for m in history) == [(s, s / 8) for s in range(40)]
    assert child.data.metrics["cost/seconds"] == 2.0
    assert [i.dataset.name for i in child.inputs.dataset_inputs] == ["pairs"]
    assert [i.path for i in client(tracker).list_artifacts(child.info.run_id, "logs")] == ["logs/train.log"]


@pytest.mark.parametrize("next_run", ["resumed", "another"])
def test_the_next_run_sends_what_waits(
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
    assert_told(tracker)
    status = client(again).get_run(tracker.run_id).info.status
    assert status == ("RUNNING" if next_run == "resumed" else "FAILED")
    assert not (workspace / "tracking_outbox").exists()
    again.finish_parent()


def test_a_stage_whose_beginning_mlflow_took_is_gone_on_with(workspace: Path) -> None:
    tracker = opened(workspace)
    with tracker.child("train") as run:
        broken = full_disk(workspace)
        broken.__enter__()
        run.tag("late", "yes")
    tracker.finish_parent("KILLED")
    broken.__exit__(None, None, None)
    opened(workspace).finish_parent()
    (child,) = children(tracker)
    assert child.data.tags["late"] == "yes"
    assert child.info.status == "FINISHED"


def test_a_run_that_finds_mlflow_back_sends_it_and_keeps_nothing(workspace: Path) -> None:
    tracker = opened(workspace)
    with full_disk(workspace):
        refused_stage(tracker, workspace)
        assert list(workspace.glob("tracking_outbox/*/writes.json")), "safe from a kill"
    tracker.finish_parent()
    assert_told(tracker)
    assert not (workspace / "tracking_outbox").exists()


def test_sending_twice_changes_nothing(workspace: Path, tmp_path: Path) -> None:
    tracker = opened(workspace)
    with full_disk(workspace):
        refused_stage(tracker, workspace)
        shutil.copytree(workspace / "tracking_outbox", tmp_path / "copy")
    tracker.finish_parent()
    shutil.copytree(tmp_path / "copy", workspace / "tracking_outbox")
    opened(workspace).finish_parent()
    assert_told(tracker)


@pytest.mark.parametrize("damage", ["cut", "empty", "other method", "folder"])
def test_damaged_writes_are_told_and_put_aside(
    workspace: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = opened(workspace)
    with full_disk(workspace):
        refused_stage(tracker, workspace)
        tracker.finish_parent("KILLED")
    (path,) = workspace.glob("tracking_outbox/*/writes.json")
    text = path.read_text()
    if damage == "folder":
        path.unlink()
        path.mkdir()
    elif damage == "other method":
        facts = json.loads(text)
        facts["writes"][0]["call"] = "__init__"
        path.write_text(json.dumps(facts))
    else:
        path.write_text(text[: len(text) // 2] if damage == "cut" else "")
    opened(workspace).finish_parent()
    assert "cannot be read" in caplog.text
    assert not children(tracker)
    assert (path.parent / "writes.json.damaged").exists()


def test_writes_for_another_mlflow_wait_for_it(workspace: Path) -> None:
    tracker = opened(workspace)
    with full_disk(workspace):
        refused_stage(tracker, workspace)
        tracker.finish_parent("KILLED")
    other = Tracker(TrackingConfig(uri=f"sqlite:///{workspace}/other.db"), workspace)
    shutil.copyfile(workspace / "mlflow.db", workspace / "other.db")
    other.start_parent("run", recipe=RECIPE)
    assert list(workspace.glob("tracking_outbox/*/writes.json"))


def test_a_model_cannot_be_registered_on_a_full_disk(workspace: Path) -> None:
    tracker = opened(workspace)
    with full_disk(workspace):
        start = time.monotonic()
        with pytest.raises(StageFailed, match="is full") as caught:
            register_model(tracker, "policy", str(workspace))
        assert str(workspace) in caught.value.problem
        assert time.monotonic() - start < 25


def test_what_could_not_be_kept_is_not_promised(workspace: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = opened(workspace)
    (workspace / "tracking_outbox").touch()  # no folder can be made there
    with full_disk(workspace):
        tracker.parent.tag("dpo.error", "the disk is full")
        tracker.finish_parent("FAILED")
    assert "writes could not be saved" in caplog.text
    assert "these writes are lost" in caplog.text
    assert "sends the writes saved" not in caplog.text
