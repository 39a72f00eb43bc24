"""Tracking against real MLflow in a SQLite store."""

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow.exceptions import MlflowException

from dpo_core.errors import RecipeError, StageFailed
from tasks.recipe.sections import TrackingConfig
from tasks.store.store import Store
from tasks.tracking import mlflow_run
from tasks.tracking.connection import resolve_uri
from tasks.tracking.registry import register_model, version_with
from tasks.tracking.tracker import Tracker
from tests.support.runs.stored import make
from tests.support.runs.tracked import RECIPE, children, client, free_port, lines, points

REPO = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def workspace(tracking_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One database for the module."""
    workspace = tmp_path_factory.mktemp("workspace")
    shutil.copyfile(tracking_database, workspace / "mlflow.db")
    return workspace


@pytest.fixture
def tracker(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Tracker:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tracker = Tracker(TrackingConfig(tags={"team": "a"}), workspace)
    tracker.start_parent("run", recipe=RECIPE, description="# Page", tags={"dpo.config_digest": "c" * 64})
    return tracker


def test_parent_says_what_ran(tracker: Tracker, workspace: Path) -> None:
    api = client(tracker)
    run = api.get_run(tracker.run_id)
    assert run.info.run_name == "run"
    assert run.data.params == {"name": "tiny", "seed": "1", "train.beta": "0.1", "train.lr": "1e-06",
                               "train.optimizer.eps": "1e-08"}  # fmt: skip
    assert run.data.tags["mlflow.note.content"] == "# Page"
    assert run.data.tags["dpo.config_digest"] == "c" * 64
    assert run.data.tags["team"] == "a"
    assert api.get_experiment(tracker.experiment_id).name == "dpo/tiny"
    folder = Path(api.download_artifacts(tracker.run_id, ""))
    assert folder.is_relative_to(workspace / "mlartifacts")
    assert yaml.safe_load((folder / "config/recipe.yaml").read_text()) == RECIPE
    facts = json.loads((folder / "environment.json").read_text())
    assert facts["packages"]["mlflow"]
    assert facts["cpu_count"] == os.cpu_count()
    tracker.finish_parent()
    assert api.get_run(tracker.run_id).info.status == "FINISHED"


def test_git_tags_or_the_baked_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from tasks.provenance import source_tags

    def git(*arguments: str) -> None:
        who = ["-c", "user.name=t", "-c", "user.email=t@t"]
        subprocess.run(["git", "-C", str(tmp_path), *who, *arguments], check=True, capture_output=True)

    monkeypatch.setenv("DPO_GIT_COMMIT", "baked")
    code = tmp_path / "provenance.py"
    code.write_text("1")
    monkeypatch.setattr("tasks.provenance.__file__", str(code))
    assert source_tags()["mlflow.source.git.commit"] == "baked"
    git("init", "-b", "trunk")
    assert source_tags()["mlflow.source.git.commit"] == "baked", "the file is not in that repository"
    git("add", ".")
    git("commit", "-m", "x")
    tags = source_tags()
    assert len(tags["mlflow.source.git.commit"]) == 40
    assert (tags["mlflow.source.git.branch"], tags["mlflow.source.git.dirty"]) == ("trunk", "false")
    code.write_text("2")
    assert source_tags()["mlflow.source.git.dirty"] == "true"


class Terminated(BaseException):
    """Like the signals that orchestrators raise."""


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, "FINISHED"),
        (StageFailed("GPU fell off\nthe bus", "Resume."), "FAILED"),
        (KeyboardInterrupt(), "KILLED"),
        (Terminated("SIGTERM"), "KILLED"),
    ],
)
def test_child_status(tracker: Tracker, error: BaseException | None, status: str) -> None:
    def stage() -> None:
        with tracker.child("train", tags={"dpo.key": "k"}):
            if error:
                raise error

    if error:
        with pytest.raises(type(error)):
            stage()
    else:
        stage()
    (child,) = children(tracker)
    assert (child.info.status, child.info.run_name) == (status, "train")
    assert child.data.tags["dpo.stage"] == "train"
    assert child.data.tags["dpo.key"] == "k"
    assert child.info.end_time
    if status == "FAILED":
        assert child.data.tags["dpo.error"] == "GPU fell off the bus. Resume."
    assert client(tracker).get_run(tracker.run_id).info.status == "RUNNING"


def test_resume_reopens_the_run_of_a_stage_and_goes_on(
    tracker: Tracker, workspace: Path, tmp_path: Path
) -> None:
    log = tmp_path / "metrics.jsonl"
    log.write_text(lines(range(1, 8), speed=1.0))
    with pytest.raises(RuntimeError, match="step 7"), tracker.child("train") as run:  # noqa: PT012
        run.metrics_from_jsonl(log)
        log.write_text(lines(range(1, 8), speed=2.0))  # the cluster has started the job again
        run.metrics_from_jsonl(log)
        run.metrics({"eval": 1.0}, step=7)
        raise RuntimeError("killed at step 7")
    tracker.parent.tag("dpo.error", "killed at step 7")
    tracker.finish_parent("FAILED")

    again = Tracker(TrackingConfig(), workspace)
    assert again.start_parent("run", recipe=RECIPE, run_id=tracker.run_id) == tracker.run_id
    assert client(again).get_run(again.run_id).info.status == "RUNNING"
    time.sleep(0.05)
    assert "dpo.error" not in client(again).get_run(again.run_id).data.tags
    # The trainer goes on from the checkpoint of step 5 and writes steps 6 and 7 once more, at other times.
    repeated = lines(range(6, 11), speed=3.0).replace("170000", "180000")
    log.write_text(lines(range(1, 8), speed=1.0) + repeated)
    with again.child("train") as resumed:
        assert resumed.run_id == run.run_id
        resumed.metrics_from_jsonl(log)
        resumed.metrics({"eval": 1.0}, step=7)
    again.finish_parent()
    assert len(children(again)) == 1
    assert points(again, resumed, "loss") == [(s, s / 8) for s in range(1, 11)]
    assert points(again, resumed, "speed") == [(s, 1.0 if s < 8 else 3.0) for s in range(1, 11)]
    assert points(again, resumed, "eval") == [(7, 1.0)]
    final = client(again).get_run(run.run_id)
    assert final.info.status == "FINISHED"
    assert "dpo.error" not in final.data.tags


def test_a_resumed_parent_has_the_same_number_once(tracker: Tracker, workspace: Path) -> None:
    tracker.parent.metrics({"gain/dpo": 0.5})
    tracker.finish_parent()
    again = Tracker(TrackingConfig(), workspace)
    again.start_parent("run", recipe=RECIPE, run_id=tracker.run_id)
    again.parent.metrics({"gain/dpo": 0.5})
    again.parent.metrics({"gain/dpo": 0.25})
    assert client(again).get_run(again.run_id).data.metrics == {"gain/dpo": 0.25}
    assert len(client(again).get_metric_history(again.run_id, "gain/dpo")) == 2


def test_resume_of_an_unknown_run(workspace: Path) -> None:
    with pytest.raises(RecipeError, match="f" * 32):
        Tracker(TrackingConfig(uri=f"sqlite:///{workspace}/mlflow.db"), workspace).start_parent(
            "run", recipe=RECIPE, run_id="f" * 32
        )


def test_only_complete_lines_are_read(
    tracker: Tracker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = tmp_path / "metrics.jsonl"
    text = lines(range(3))
    with tracker.child("train") as run:
        assert run.metrics_from_jsonl(log) == 0
        log.write_text(text + '{"step": 3, "lo')
        offset = run.metrics_from_jsonl(log)
        assert offset == len(text)
        with log.open("a") as file:
            file.write('ss": 7.5, "note": "x", "bad": NaN, "nested": {"a": 1}}\nrubbish\n[1]\n{"loss": 1}\n')
        offset = run.metrics_from_jsonl(log, offset)
        assert offset == log.stat().st_size == run.metrics_from_jsonl(log, offset)
    assert points(tracker, run, "loss") == [(0, 0.0), (1, 0.125), (2, 0.25), (3, 7.5)]
    assert set(client(tracker).get_run(run.run_id).data.metrics) == {"loss", "rewards/chosen", "bad"}
    assert "rubbish" in caplog.text


def test_params_and_tags_keep_to_the_limits(tracker: Tracker, caplog: pytest.LogCaptureFixture) -> None:
    many: dict[str, Any] = {f"p{i}": i for i in range(250)}
    with tracker.child("prepare") as run:
        run.params(
            {"long": "x" * 7000, "exact": "y" * 6000, "a": {"b": [1, 2], "c": None}, **many, "k" * 300: 1}
        )
        run.tag("long", "t" * 9000)
        run.params({"p2": "changed", "new": 1})
    data = client(tracker).get_run(run.run_id).data
    assert len(data.params) == 256
    assert (len(data.params["long"]), data.params["exact"]) == (6000, "y" * 6000)
    assert (data.params["a.b"], data.params["a.c"]) == ("[1, 2]", "null")
    assert len(data.tags["long"]) == 8000
    assert (data.params["p2"], data.params["new"]) == ("2", "1")
    assert "keeps the first values of these params of prepare: p2" in caplog.text


def test_metrics_of_any_number_and_name(tracker: Tracker) -> None:
    with tracker.child("evaluate") as run:
        run.metrics({f"by_prompt/{i}": i / 2 for i in range(2345)}, step=3)
        run.metrics({"odd name: 50% (α)//x/": 1.0})
    metrics = client(tracker).get_run(run.run_id).data.metrics
    assert len(metrics) == 2346
    assert (metrics["by_prompt/2344"], metrics["odd name: 50_ ___/x"]) == (1172.0, 1.0)


def test_datasets_are_inputs_with_their_digest(tracker: Tracker) -> None:
    with tracker.child("train") as run:
        run.dataset("hh", "d" * 64, 1200, "/data/hh.jsonl.gz", "training")
        run.dataset("hh", "d" * 64, 1200, "/data/hh.jsonl.gz", "training")
        run.dataset("eval", "e" * 20, None, "https://example.org/x.jsonl", "evaluation")
    inputs = client(tracker).get_run(run.run_id).inputs.dataset_inputs
    datasets = {i.dataset.name: i for i in inputs}
    assert len(inputs) == 2
    assert datasets["hh"].dataset.digest == "d" * 36
    assert json.loads(datasets["hh"].dataset.profile) == {"num_rows": 1200}
    assert json.loads(datasets["hh"].dataset.source) == {"uri": "/data/hh.jsonl.gz"}
    assert [(t.key, t.value) for t in datasets["eval"].tags] == [("mlflow.data.context", "evaluation")]
    from mlflow.data import get_source

    assert get_source(datasets["hh"]).uri == "/data/hh.jsonl.gz"
    assert get_source(datasets["eval"]).url == "https://example.org/x.jsonl"


def test_artifacts(tracker: Tracker, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "page.html").write_text("page")
    with tracker.child("validate") as run:
        run.artifact(tmp_path / "docs" / "page.html", "report")
        run.artifact(tmp_path / "docs", "all")
        run.artifact(tmp_path / "nowhere", "all")  # refused with a line in the log, not raised
    folder = Path(client(tracker).download_artifacts(run.run_id, ""))
    assert (folder / "report/page.html").read_text() == (folder / "all/page.html").read_text() == "page"


def test_register_model_by_reference(
    tracker: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "model"
    weights.mkdir()
    version = register_model(tracker, "tiny.policy", str(weights), tags={"dpo.sha256": "a" * 64})
    assert register_model(tracker, "tiny.policy", str(weights)) == version, "a resume registers nothing twice"
    registered = client(tracker).get_model_version_by_alias("tiny.policy", "challenger")
    assert (str(registered.version), registered.run_id) == (version, tracker.run_id)
    assert registered.tags == {"dpo.weights_uri": weights.as_uri(), "dpo.sha256": "a" * 64}
    update, answers = tracker.connection.client.update_model_version, [MlflowException("away")]

    def away_at_first(*arguments: Any) -> Any:
        if answers:
            raise answers.pop()
        return update(*arguments)

    monkeypatch.setattr(tracker.connection.client, "update_model_version", away_at_first)
    tracker.describe_version("tiny.policy", version, "# It won")
    assert client(tracker).get_model_version("tiny.policy", version).description == "# It won"
    second = register_model(tracker, "tiny.policy", str(tmp_path / "other"), alias="champion")
    assert int(second) == int(version) + 1
    assert client(tracker).get_model_version_by_alias("tiny.policy", "champion").version == int(second)
    assert not list(weights.iterdir())


def test_weights_that_are_registered_are_known_by_their_digest(tracker: Tracker, tmp_path: Path) -> None:
    name, digest = "tiny.known", "d" * 64
    assert version_with(tracker, name, digest) is None
    for folder in ("first", "second", "gone"):
        (tmp_path / folder).mkdir()
        sha256 = digest if folder != "second" else "e" * 64
        register_model(tracker, name, str(tmp_path / folder), tags={"dpo.artifact_sha256": sha256})
    assert version_with(tracker, name, digest).version == 3
    (tmp_path / "gone").rmdir()
    assert version_with(tracker, name, digest).version == 1, "of the version whose files are there"
    assert version_with(tracker, name, "f" * 64) is None


def test_uri_is_absolute_whatever_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    assert Tracker(TrackingConfig(), "runs").uri == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert resolve_uri(TrackingConfig(uri="sqlite:///x.db"), tmp_path) == f"sqlite:///{tmp_path}/x.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert resolve_uri(TrackingConfig(), tmp_path) == "http://127.0.0.1:5000"
    assert resolve_uri(TrackingConfig(uri="sqlite:////a/b.db"), tmp_path) == "sqlite:////a/b.db"
    for uri in ("./mlruns", "file:///tmp/mlruns", "/tmp/mlruns"):
        with pytest.raises(RecipeError, match="no longer"):
            resolve_uri(TrackingConfig(uri=uri), tmp_path)


def test_a_path_that_no_address_can_hold_is_told_as_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(RecipeError, match="question mark"):
        resolve_uri(TrackingConfig(), tmp_path / "what?")
    uri = f"sqlite:///{tmp_path}/x.db"
    assert resolve_uri(TrackingConfig(uri=uri), tmp_path / "what?") == uri


def test_nobody_there_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.tracking.tracker.START_PATIENCE", 1.0)
    uri = f"http://user:secret@127.0.0.1:{free_port()}"
    with pytest.raises(StageFailed, match="does not answer") as caught:
        Tracker(TrackingConfig(uri=uri), tmp_path).start_parent("run", recipe=RECIPE)
    assert "secret" not in str(caught.value)


def opened(workspace: Path, name: str, run_id: str | None = None, *, reopen: bool = False) -> Tracker:
    tracker = Tracker(TrackingConfig(uri=f"sqlite:///{workspace}/mlflow.db"), workspace)
    tracker.start_parent(name, recipe=RECIPE, run_id=run_id, reopen=reopen, tags={"dpo.run": name})
    return tracker


def test_a_parent_whose_id_nobody_noted_is_found_again(workspace: Path) -> None:
    tracker = opened(workspace, "noted")
    with tracker.child("train", tags={"dpo.run": "noted"}):
        again = opened(workspace, "noted", reopen=True)
    assert again.run_id == tracker.run_id
    assert opened(workspace, "noted-2", reopen=True).run_id != tracker.run_id
    # Of another workspace that shares the server, and starts a run of this name in the same second.
    assert opened(workspace, "noted").run_id != tracker.run_id


def test_a_stage_that_was_killed_after_it_had_stored_is_ended(tracker: Tracker, workspace: Path) -> None:
    artifact = make(Store(workspace), {"metrics.jsonl": lines(range(1, 5)).encode()})
    child = tracker.child("train").__enter__()
    curve = workspace / "curve.jsonl"
    curve.write_text(lines(range(1, 3)))
    child.metrics_from_jsonl(curve)
    again = opened(workspace, "run", tracker.run_id)
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
        monkeypatch.setattr(mlflow_run, "now_ms", lambda: int(1000 * (time.time() - 3600)))
    tracker.finish_parent()
    for run in (*children(tracker), client(tracker).get_run(tracker.run_id)):
        assert run.info.status == "FINISHED"
        assert run.info.end_time >= run.info.start_time


def test_a_signal_amid_a_write_raises_after_it_and_leaves_no_lock(tracker: Tracker, workspace: Path) -> None:
    from sqlalchemy import event

    engine = tracker.connection.client._tracking_client.store.engine
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
