"""Runs that are stopped in the middle: started with real processes, and looked at from outside."""

import contextlib
import json
import os
import subprocess
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from mlflow import MlflowClient

from dpo_core.training.checkpoints import read_digest
from tests.scenarios.bad_inputs import World, good_rows, lines
from tests.support.runs.tiny_run import Bench
from tests.support.sites.prefect_site import until

MARK = "DPO_TEST_RUN"
PATIENCE = 30.0
"""Seconds after which nothing of a stopped run may live."""
ENGINE = {"precision": "fp32", "threads": 1, "save_every": 2}
TRAINING = {"epochs": 500, "max_steps": 40, "batch_size": 4, "micro_batch_size": 4, "engine": ENGINE}
SAMPLING = {"max_new_tokens": 24, "batch_size": 2, "precision": "fp32"}
MEASURED = {"prompts": 6, "samples_per_prompt": 4, "sampling": SAMPLING, "precision": "fp32"}


def long_recipe(world: World, **changes: Any) -> dict[str, Any]:
    """The stages that there must be; training and evaluation last long enough to be stopped."""
    (world.folder / "good.jsonl").write_text(lines(good_rows()))
    return world.recipe_of(policies={"DPO": TRAINING}, evaluate=MEASURED, **changes)


def forget(bench: Bench, *stages: str) -> None:
    """As if these stages had never run."""
    for stage in stages:
        for path in (bench.workspace / "store" / "index" / stage.partition(" ")[0]).glob("*.json"):
            path.unlink()


@dataclass
class Family:
    """All processes that carry a mark in their environment."""

    mark: str = field(default_factory=lambda: uuid.uuid4().hex)

    def alive(self, *but: int) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                zombie = process.status() == psutil.STATUS_ZOMBIE
                if process.environ().get(MARK) == self.mark and not zombie and process.pid not in but:
                    found.append(process)
        return found

    def gone_after(self, *but: int) -> float:
        """Seconds until none of them lives."""
        start = time.monotonic()
        while left := self.alive(*but):
            waited = time.monotonic() - start
            assert waited < PATIENCE, "\n".join(" ".join(_command(one)) for one in left)
            time.sleep(0.1)
        return time.monotonic() - start

    def end(self) -> None:
        for process in self.alive():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def _command(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return [str(process.pid), *process.cmdline()]
    return []


def start(bench: Bench, family: Family) -> subprocess.Popen[bytes]:
    """`dpo run` in a process group of its own, as a shell gives it."""
    with (bench.folder / "stopped.log").open("w") as output:
        return subprocess.Popen(
            bench.command("run", str(bench.recipe)),
            env=bench.environment() | {MARK: family.mark},
            cwd=bench.folder,
            stdout=output,
            stderr=output,
            process_group=0,
        )


def wait_for(found: Callable[[], bool], log: Path, alive: Callable[[], bool]) -> None:
    """Wait for a moment in a run that must not have ended before."""

    def look() -> bool:
        reached = found()
        assert reached or alive(), f"the run ended too early:\n{log.read_text()[-3000:]}"
        return reached

    until(look, 600, 0.02)


def checkpoints(workspace: Path) -> list[Path]:
    """The newest checkpoint of each training that is under way."""
    folders = (workspace / "work" / "train-dpo").glob("*/checkpoints")
    return [max(found) for folder in folders if (found := list(folder.glob("step-*")))]


def assert_whole(workspace: Path, count: int = 1) -> list[int]:
    """The newest checkpoints verify; their steps."""
    newest = checkpoints(workspace)
    assert len(newest) == count
    return [read_digest(folder).step for folder in newest]


def newest_record(workspace: Path) -> dict[str, Any]:
    records = [json.loads(path.read_text()) for path in (workspace / "runs").glob("*/run.json")]
    return max(records, key=lambda record: record["started_at"])


def tracked(workspace: Path, record: dict[str, Any]) -> dict[str, str]:
    """Name and status of the record's run in MLflow, under its own name `run`, and of the runs below it."""
    client = MlflowClient(f"sqlite:///{workspace / 'mlflow.db'}")
    parent = client.get_run(record["mlflow_run_id"])
    query = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    below = client.search_runs([parent.info.experiment_id], query)
    return {"run": parent.info.status} | {one.info.run_name: one.info.status for one in below}


def signal_all(process: subprocess.Popen[bytes], number: int) -> None:
    """What a terminal does with Ctrl-C."""
    os.killpg(process.pid, number)
