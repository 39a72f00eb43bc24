"""Tracking against a real MLflow server that goes away and comes back."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks.recipe.sections import TrackingConfig
from tasks.tracking.mlflow_run import StageRun
from tasks.tracking.outbox import PATIENCE
from tasks.tracking.registry import register_model
from tasks.tracking.tracker import Tracker
from tests.support.runs.tracked import RECIPE, children, client, free_port, lines, points


class Server:
    """A real `mlflow server` that can be stopped and started again on its port."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port, self.process = folder, free_port(), None
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [
            sys.executable, "-m", "mlflow", "server", "--port", str(self.port), "--workers", "1",
            "--backend-store-uri", f"sqlite:///{self.folder}/server.db",
            "--artifacts-destination", str(self.folder / "artifacts"),
        ]  # fmt: skip
        with (self.folder / "server.log").open("a") as out:
            self.process = subprocess.Popen(
                command, cwd=self.folder, stdout=out, stderr=out, start_new_session=True
            )
        deadline = time.time() + 600
        while time.time() < deadline:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=2):
                    return
            except OSError:
                time.sleep(0.3)
        raise AssertionError((self.folder / "server.log").read_text()[-3000:])

    def stop(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)  # its own session: the group is the server's alone
            self.process.wait()
            self.process = None


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
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "tasks.tracking.outbox")
    tracker = Tracker(TrackingConfig(), tmp_path)
    tracker.start_parent("run", recipe=RECIPE)
    log, offset, slowest = tmp_path / "metrics.jsonl", 0, 0.0

    def train(run: StageRun, steps: range, offset: int) -> tuple[int, float]:
        slowest = 0.0
        for start in range(steps.start, steps.stop, 20):
            with log.open("a") as file:
                file.write(lines(range(start, start + 20)))
            began = time.monotonic()
            offset = run.metrics_from_jsonl(log, offset)
            run.metrics({"eval": float(start)}, step=start)
            slowest = max(slowest, time.monotonic() - began)
            time.sleep(0.2)
        return offset, slowest

    with tracker.child("train") as run:
        offset, _ = train(run, range(0, 200), 0)
        assert offset == log.stat().st_size
        server.stop()
        stuck, slowest = train(run, range(200, 600), offset)
        assert stuck == offset
        server.start()
        offset, _ = train(run, range(600, 800), stuck)
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

    steps = list(range(800))
    for key, value in (("loss", 1 / 8), ("rewards/chosen", -1.0)):
        assert points(tracker, run, key) == sorted((step, step * value) for step in steps)
    assert points(tracker, run, "eval") == [(step, float(step)) for step in range(0, 800, 20)]
    assert points(tracker, evaluate, "win_rate") == [(1, 0.75)]
    assert sorted((c.info.run_name, c.info.status) for c in children(tracker)) == [
        ("evaluate", "FINISHED"),
        ("train", "FINISHED"),
    ]
    parent = client(tracker).get_run(tracker.run_id)
    assert parent.info.status == "FINISHED"
    assert int(parent.data.tags["dpo.tracking_delay_s"]) >= 4
    messages = [record.getMessage() for record in caplog.records if record.name == "tasks.tracking.outbox"]
    assert sum("does not answer" in message for message in messages) == 2, "one line for each outage"
    assert sum("answers again" in message for message in messages) == 2
    assert not any("refused" in message for message in messages)
    assert slowest < 5, f"a call held the training for {slowest:.1f} s"


@pytest.mark.slow
def test_register_and_resume_on_a_server(server: Server, tmp_path: Path) -> None:
    tracker = Tracker(TrackingConfig(), tmp_path)
    tracker.start_parent("run", recipe=RECIPE)
    (tmp_path / "model").mkdir()
    version = register_model(tracker, "policy", str(tmp_path / "model"))
    registered = client(tracker).get_model_version_by_alias("policy", "challenger")
    assert (str(registered.version), registered.run_id) == (version, tracker.run_id)
    assert registered.source.startswith("models:/"), "a server takes no local paths"
    assert registered.tags["dpo.weights_uri"] == (tmp_path / "model").as_uri()
    with tracker.child("train") as run:
        run.metrics({"loss": 1.0}, step=1)
        run.dataset("hh", "d" * 64, 3, "/data/x", "training")
    tracker.finish_parent("FAILED")
    again = Tracker(TrackingConfig(), tmp_path)
    again.start_parent("run", recipe=RECIPE, run_id=tracker.run_id)
    with again.child("train") as resumed:
        resumed.metrics({"loss": 1.0}, step=1)
        resumed.metrics({"loss": 0.5}, step=2)
    assert resumed.run_id == run.run_id
    assert points(again, resumed, "loss") == [(1, 1.0), (2, 0.5)]
    assert (Path(client(again).download_artifacts(again.run_id, "config")) / "recipe.yaml").exists()


@pytest.mark.slow
def test_mlflow_gone_for_good_loses_no_result(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for status in PATIENCE:
        monkeypatch.setitem(PATIENCE, status, 1.0)
    tracker = Tracker(TrackingConfig(), tmp_path)
    tracker.start_parent("run", recipe=RECIPE)
    server.stop()
    with tracker.child("train") as run:
        run.metrics({"loss": 1.0})
    with pytest.raises(KeyboardInterrupt), tracker.child("evaluate"):
        raise KeyboardInterrupt
    tracker.finish_parent()
    assert "did not accept" in caplog.text
