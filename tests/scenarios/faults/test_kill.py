"""kill -9 in every stage of a real run, then `--resume`: the result is that of a run left in peace."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.flows.test_alignment import STAGES
from tests.scenarios.faults.whole import forget_from, left_running

TRAINED = {"prepare-sft", "train-dpo DPO", "train-ppo PPO"}


def _in_the_middle(bench, stage: str, log: Path) -> bool:
    if f"{stage}: running" not in log.read_text():
        return False
    work = bench.workspace / "work" / stage.partition(" ")[0]
    # A trainer is killed between two checkpoints, with one on the disk.
    return stage not in TRAINED or any(work.glob("*/checkpoints/step-*"))


def _kill_in(bench, stage: str) -> None:
    """Kills the run in the middle of the stage."""
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


@pytest.mark.faults
@pytest.mark.parametrize("stage", STAGES)
def test_resume_after_a_kill_ends_as_if_nothing_had_happened(finished, stage):
    reference, whole = finished
    own = reference.copy(f"killed-{stage}")
    forget_from(own, stage)
    _kill_in(own, stage)
    report = own.run("--resume")
    assert own.index() == reference.index(), "every artifact, bit for bit"
    assert report["evaluation"] == whole["evaluation"]
    states = own.states(report)
    assert all(states[s] == "cached" for s in STAGES[: STAGES.index(stage)])
    assert not left_running(own.workspace)
