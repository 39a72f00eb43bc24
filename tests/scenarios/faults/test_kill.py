"""kill -9 in every stage of a real run, then `--resume`: the result is that of a run left in peace."""

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.flows.test_alignment import STAGES
from tests.scenarios.faults.whole import forget_from

TRAINED = {"prepare-sft", "train-dpo DPO", "train-ppo PPO"}


def _in_the_middle(bench, stage: str, log: Path) -> bool:
    if f"{stage}: running" not in log.read_text():
        return False
    work = bench.workspace / "work" / stage.partition(" ")[0]
    # A trainer is killed between two checkpoints, with one on the disk.
    return stage not in TRAINED or any(work.glob("*/checkpoints/step-*"))


def _kill_in(bench, stage: str) -> int:
    """Kills the run in the middle of the stage; returns its process number."""
    log = bench.folder / "killed.log"
    with log.open("w") as output:
        flow = subprocess.Popen(
            bench.command("run", str(bench.recipe)),
            env=bench.environment(),
            cwd=bench.folder,
            stdout=output,
            stderr=output,
        )
    deadline = time.monotonic() + 600
    while not _in_the_middle(bench, stage, log):
        assert flow.poll() is None, f"the run ended before {stage}:\n{log.read_text()}"
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)
    os.kill(flow.pid, signal.SIGKILL)
    flow.wait()
    return flow.pid


def _started_by(flow: int) -> list[psutil.Process]:
    """What still runs of the flow with this number: its trainers and its temporary Prefect server."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if process.environ().get("DPO_FLOW_PID") == str(flow):
                found.append(process)
    return found


@pytest.mark.faults
@pytest.mark.parametrize("stage", STAGES)
def test_resume_after_a_kill_ends_as_if_nothing_had_happened(finished, stage):
    reference, whole = finished
    own = reference.copy(f"killed-{stage}")
    forget_from(own, stage)
    flow = _kill_in(own, stage)
    report = own.run("--resume")
    assert own.index() == reference.index(), "every artifact, bit for bit"
    assert report["evaluation"] == whole["evaluation"]
    states = own.states(report)
    assert all(states[s] == "cached" for s in STAGES[: STAGES.index(stage)])
    assert not _started_by(flow)
