"""Tracking against real MLflow in a SQLite store."""

import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo_core.errors import RecipeError, StageFailed
from tasks.recipe.sections import TrackingConfig
from tasks.tracking.mlflow_run import flatten
from tasks.tracking.registry import register_model, version_with
from tasks.tracking.tracker import Tracker, resolve_uri
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
    log.write_text(lines(range(1, 8)))
    with pytest.raises(RuntimeError, match="step 7"), tracker.child("train") as run:  # noqa: PT012
        run.metrics_from_jsonl(log)
        run.metrics({"eval": 1.0}, step=7)
        raise RuntimeError("killed at step 7")
    with tracker.child("validate") as done:
        done.metrics({"rows": 10})
    (first,) = [c for c in children(tracker) if c.data.tags["dpo.stage"] == "validate"]
    tracker.parent.tag("dpo.error", "killed at step 7")
    tracker.finish_parent("FAILED")

    again = Tracker(TrackingConfig(), workspace)
    assert again.start_parent("run", recipe=RECIPE, run_id=tracker.run_id) == tracker.run_id
    assert client(again).get_run(again.run_id).info.status == "RUNNING"
    time.sleep(0.05)
    assert "dpo.error" not in client(again).get_run(again.run_id).data.tags
    with again.child("validate"):  # found in the store: nothing new
        pass
    # The trainer goes on from the checkpoint of step 5 and writes steps 6 and 7 once more, at other times.
    log.write_text(lines(range(1, 8)) + lines(range(6, 11)).replace("170000", "180000"))
    with again.child("train") as resumed:
        assert (resumed.run_id, resumed.stage) == (run.run_id, "train")
        resumed.metrics_from_jsonl(log)
        resumed.metrics({"eval": 1.0}, step=7)
    again.finish_parent()
    assert len(children(again)) == 2
    assert points(again, resumed, "loss") == [(s, s / 8) for s in range(1, 11)]
    assert points(again, resumed, "eval") == [(7, 1.0)]
    final = client(again).get_run(run.run_id)
    assert final.info.status == "FINISHED"
    assert "dpo.error" not in final.data.tags
    (cached,) = [c for c in children(again) if c.data.tags["dpo.stage"] == "validate"]
    assert (cached.info.status, cached.info.end_time) == ("FINISHED", first.info.end_time)


def test_the_parent_holds_numbers_and_data_of_its_own(tracker: Tracker, workspace: Path) -> None:
    tracker.parent.metrics({"gain/dpo": 0.5})
    tracker.parent.dataset("pairs", "d" * 64, 3, "/data/pairs", "training")
    tracker.finish_parent()
    again = Tracker(TrackingConfig(), workspace)
    again.start_parent("run", recipe=RECIPE, run_id=tracker.run_id)
    again.parent.metrics({"gain/dpo": 0.5})
    again.parent.metrics({"gain/dpo": 0.25})
    run = client(again).get_run(again.run_id)
    assert run.data.metrics == {"gain/dpo": 0.25}
    assert len(client(again).get_metric_history(again.run_id, "gain/dpo")) == 2, "the same number once"
    assert [i.dataset.name for i in run.inputs.dataset_inputs] == ["pairs"]


def test_a_child_lasts_as_long_as_its_stage(tracker: Tracker) -> None:
    began = time.time()
    with tracker.child("train"):
        entered = time.time()
        time.sleep(0.3)
    ended = time.time()
    info = children(tracker)[0].info
    assert began - 0.01 <= info.start_time / 1000 <= entered, "not when MLflow took the run"
    assert entered + 0.29 <= info.end_time / 1000 <= ended


def test_a_registered_version_is_described(tracker: Tracker, tmp_path: Path) -> None:
    version = register_model(tracker, "tiny.described", str(tmp_path))
    tracker.describe_version("tiny.described", version, "# It won")
    assert client(tracker).get_model_version("tiny.described", version).description == "# It won"


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


def test_lines_are_not_lost_when_the_stage_commits_its_folder(tracker: Tracker, tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    log = tmp_path / "scratch" / "metrics.jsonl"
    log.write_text(lines(range(2)))
    with tracker.child("train") as run:
        run.metrics_from_jsonl(log)
        log.write_text(lines(range(5)))
        (tmp_path / "scratch").rename(tmp_path / "store")
    assert [step for step, _ in points(tracker, run, "loss")] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("total", [None, 30_000, 7_000])
def test_long_curves_are_thinned(tracker: Tracker, tmp_path: Path, total: int | None) -> None:
    log = tmp_path / "metrics.jsonl"
    steps = total or 30_000
    log.write_text(lines(range(1, steps + 1)))
    with tracker.child("train", total_steps=total) as run:
        run.metrics_from_jsonl(log)
    curve = points(tracker, run, "loss")
    assert 1300 < len(curve) <= 2000
    assert curve[0][0] == 1
    assert curve[-1] == (steps, steps / 8), "the last value is what people read"
    assert all(value == step / 8 for step, value in curve)
    gaps = [b - a for (a, _), (b, _) in itertools.pairwise(curve)]
    assert max(gaps) <= (steps // 1900 + 1 if total else steps * 0.011)


def test_more_metrics_than_a_batch_holds(tracker: Tracker) -> None:
    with tracker.child("evaluate") as run:
        run.metrics({f"by_prompt/{i}": i / 2 for i in range(2345)}, step=3)
        run.metrics({"odd name: 50% (α)//x/": 1.0})
    metrics = client(tracker).get_run(run.run_id).data.metrics
    assert len(metrics) == 2346
    assert metrics["by_prompt/2344"] == 1172.0
    assert metrics["odd name: 50_ ___/x"] == 1.0


def test_repeated_metrics_are_stored_once_and_corrections_count(tracker: Tracker) -> None:
    with tracker.child("evaluate") as run:
        for value in (1.0, 1.0, float("nan"), float("nan"), 2.0):
            run.metrics({"score": value}, step=1)
            time.sleep(0.002)
    history = client(tracker).get_metric_history(run.run_id, "score")
    assert [str(m.value) for m in history] == ["1.0", "nan", "2.0"]
    assert client(tracker).get_run(run.run_id).data.metrics["score"] == 2.0


def test_params_and_tags_keep_to_the_limits(tracker: Tracker, caplog: pytest.LogCaptureFixture) -> None:
    many: dict[str, Any] = {f"p{i}": i for i in range(250)}
    with tracker.child("prepare") as run:
        run.params(
            {"long": "x" * 7000, "exact": "y" * 6000, "a": {"b": [1, 2], "c": None}, **many, "k" * 300: 1}
        )
        run.tag("long", "t" * 9000)
        run.params({"p1": 1, "p2": "changed", "new": 1})
    data = client(tracker).get_run(run.run_id).data
    assert len(data.params) == 256
    assert (len(data.params["long"]), data.params["exact"]) == (6000, "y" * 6000)
    assert (data.params["a.b"], data.params["a.c"]) == ("[1, 2]", "null")
    assert len(data.tags["long"]) == 8000
    assert (data.params["p2"], data.params["new"]) == ("2", "1")
    assert "keeps the first value of p2" in caplog.text


def test_large_recipes_give_headline_params_only(workspace: Path) -> None:
    recipe = {"name": "tiny", "deep": {f"d{i}": i for i in range(300)}, **{f"top{i}": i for i in range(30)}}
    tracker = Tracker(TrackingConfig(uri=f"sqlite:///{workspace}/mlflow.db"), workspace)
    tracker.start_parent("run", recipe=recipe)
    params = client(tracker).get_run(tracker.run_id).data.params
    assert len(params) == 200
    assert {f"top{i}" for i in range(30)} < params.keys()


def test_flatten() -> None:
    assert flatten({"a": {"b": {"c": 1}, "d": [1]}, "e": None}) == {"a.b.c": 1, "a.d": [1], "e": None}


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


def test_register_model_by_reference(tracker: Tracker, tmp_path: Path) -> None:
    weights = tmp_path / "model"
    weights.mkdir()
    version = register_model(tracker, "tiny.policy", str(weights), tags={"dpo.sha256": "a" * 64})
    assert register_model(tracker, "tiny.policy", str(weights)) == version, "a resume registers nothing twice"
    registered = client(tracker).get_model_version_by_alias("tiny.policy", "challenger")
    assert (str(registered.version), registered.run_id) == (version, tracker.run_id)
    assert registered.source == weights.as_uri()
    assert registered.tags == {"dpo.weights_uri": weights.as_uri(), "dpo.sha256": "a" * 64}
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
    monkeypatch.setattr("tasks.tracking.tracker._START_PATIENCE", 1.0)
    uri = f"http://user:secret@127.0.0.1:{free_port()}"
    with pytest.raises(StageFailed, match="does not answer") as caught:
        Tracker(TrackingConfig(uri=uri), tmp_path).start_parent("run", recipe=RECIPE)
    assert "secret" not in str(caught.value)


CACHED_RUN = """
import sys, time
began = time.time()
from tasks.tracking.tracker import (Tracker)
from tasks.recipe.sections import (TrackingConfig)
tracker = Tracker(TrackingConfig(uri=sys.argv[1]), sys.argv[2])
tracker.start_parent("cached", recipe={"name": "tiny", "seed": 1})
for stage in ("validate", "sft", "ref-logprobs", "dpo-train", "ppo-baseline", "evaluate", "promote"):
    with tracker.child(stage) as run:
        run.tag("dpo.cached", True)
        run.metrics({"rows": 1})
tracker.finish_parent()
print(time.process_time() - began)
"""


def test_a_cached_run_costs_little_time(tracker: Tracker, workspace: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", CACHED_RUN, tracker.uri, str(workspace)]
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    seconds = float(done.stdout)
    print(f"tracking of a fully cached run of 7 stages: {seconds:.1f} s of processor time")
    assert seconds < 30  # 5 s on a quiet machine
    assert "alembic" not in done.stderr
    assert not list(tmp_path.iterdir()), "nothing lands in the working directory"
