"""A real MLflow server that dies or hangs for a minute in the middle of training, or for good."""

import json
import os
import signal
import statistics
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient

from tests.support.runs.tiny_run import ENGINE, Bench
from tests.support.sites.mlflow_server import Server

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]
STEPS = 900
AWAY = 60.0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "server").mkdir()
    server = Server(tmp_path / "server")
    server.start()
    yield server
    server.stop()


@pytest.fixture
def own(bench: Bench, server: Server, tmp_path: Path) -> Bench:
    """A recipe of pairs and a DPO of more than a minute, tracked by the server."""
    own = Bench(tmp_path / "flow")
    own.folder.mkdir()
    rows = [
        {"prompt": f"The soup of day {i} was", "chosen": " good and warm.", "rejected": f" bad and cold {i}."}
        for i in range(40)
    ]
    data = own.folder / "pairs.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    recipe = yaml.safe_load(bench.recipe.read_text())
    recipe |= {"workspace": str(own.workspace), "data": {"path": str(data), "eval_fraction": 0.2}}
    recipe |= {"sft": {"enabled": False}, "tracking": {"uri": server.uri}}
    del recipe["policies"]["PPO"]
    recipe["policies"]["DPO"] |= {"epochs": 1000, "max_steps": STEPS, "engine": ENGINE | {"save_every": 100}}
    del recipe["pairs"]
    own.recipe.write_text(yaml.safe_dump(recipe))
    return own


class Flow:
    """A `dpo run` that goes on while the test does other things."""

    def __init__(self, own: Bench, *more: str) -> None:
        self.own, self.log = own, own.folder / "run.log"
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                own.command("run", str(own.recipe), *more),
                env=own.environment(),
                cwd=own.folder,
                stdout=output,
                stderr=output,
            )

    def until_step(self, step: int) -> None:
        deadline = time.monotonic() + 900
        while len(self.curve()) < step:
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)

    def curve(self) -> list[dict]:
        """What the trainer wrote so far."""
        found = list(self.own.workspace.glob("work/train-dpo/*/metrics.jsonl"))
        lines = found[0].read_text().split("\n")[:-1] if found else []
        return [json.loads(line) for line in lines]

    def curve_of(self, seconds: float) -> list[dict]:
        """The longest curve that was seen in this time: a training that is done takes its file away."""
        deadline, longest = time.monotonic() + seconds, self.curve()
        while time.monotonic() < deadline:
            time.sleep(0.2)
            longest = max(longest, self.curve(), key=len)
        return longest

    def ended(self) -> tuple[int, str]:
        return self.process.wait(timeout=900), self.log.read_text()


def tracked(server: Server, own: Bench) -> tuple[MlflowClient, str, dict[str, list]]:
    """The parent run's id, and the runs of its stages by name."""
    client = MlflowClient(server.uri)
    (path,) = own.workspace.glob("runs/*/run.json")
    parent = client.get_run(json.loads(path.read_text())["mlflow_run_id"])
    query = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    runs: dict[str, list] = {}
    for child in client.search_runs([parent.info.experiment_id], query):
        runs.setdefault(child.info.run_name, []).append(child)
    assert parent.info.status == "FINISHED"
    return client, parent.info.run_id, runs


def assert_all_there(server: Server, own: Bench) -> None:
    """Every stage once, every step once, with the value that the trainer wrote."""
    client, _, runs = tracked(server, own)
    assert {name: [r.info.status for r in found] for name, found in runs.items()} == {
        name: ["FINISHED"]
        for name in (
            "load-data", "import-model", "validate-pairs", "cache-reference", "train-dpo DPO", "evaluate",
        )
    }  # fmt: skip
    (trained,) = runs["train-dpo DPO"]
    (curve,) = own.workspace.glob("store/objects/model/*/*/metrics.jsonl")
    lines = [json.loads(line) for line in curve.read_text().splitlines()]
    assert len(lines) == STEPS, "training lost no step"
    for key in ("loss", "rewards/margins", "grad_norm"):
        history = client.get_metric_history(trained.info.run_id, key)
        sent = sorted((m.step, m.value) for m in history)
        assert sent == [(line["step"], line[key]) for line in lines], key
    assert trained.data.params["objective"]
    assert trained.data.tags["dpo.artifact_sha256"]
    assert [i.path for i in client.list_artifacts(trained.info.run_id, "logs")] == ["logs/job.log"]


@pytest.mark.parametrize("how", ["killed", "hangs"])
def test_a_minute_without_mlflow_in_training_costs_nothing(server: Server, own: Bench, how: str) -> None:
    flow = Flow(own)
    flow.until_step(100)
    before = flow.curve()
    if how == "killed":
        server.stop()
        away = flow.curve_of(AWAY)
        server.start()
    else:
        os.killpg(server.process.pid, signal.SIGSTOP)
        away = flow.curve_of(AWAY)
        os.killpg(server.process.pid, signal.SIGCONT)
    code, text = flow.ended()
    assert code == 0, text
    assert "does not answer" in text
    assert "answers again" in text or "Traceback" not in text
    assert_all_there(server, own)
    with_it, without = (
        statistics.median(line["seconds_per_step"] for line in lines)
        for lines in (before[10:], away[len(before) :])
    )
    print(f"{how}: {with_it * 1e3:.1f} ms a step with MLflow, {without * 1e3:.1f} ms without")
    assert without < 1.5 * with_it, "training does not wait for MLflow"


def test_mlflow_gone_for_good_keeps_what_it_would_have_been_told(server: Server, own: Bench) -> None:
    flow = Flow(own)
    flow.until_step(100)
    server.stop()
    code, text = flow.ended()
    assert code == 4, text
    assert "does not answer" in text
    assert "to resume: dpo run" in text
    assert "sends the writes saved in" in text
    assert list(own.workspace.glob("tracking_outbox/*/*.json"))
    assert list(own.workspace.glob("store/index/train-dpo/*.json")), "what was trained is kept"
    server.start()
    again = own.dpo("run", str(own.recipe), "--resume")
    assert again.returncode == 0, again.stderr
    assert "sending MLflow" in again.stderr
    assert "train-dpo DPO: cached" in again.stderr
    assert_all_there(server, own)
    assert not (own.workspace / "tracking_outbox").exists()
