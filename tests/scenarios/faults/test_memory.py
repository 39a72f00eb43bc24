"""Memory runs out and the kernel kills: what people are told, and that the run goes on where it was."""

import subprocess
import time
from collections.abc import Callable, Iterator

import psutil
import pytest

from tests.scenarios.faults.memory import Room, room
from tests.scenarios.faults.whole import assert_store_clean, forget_from, left_running
from tests.support.runs.processes import jobs_among
from tests.support.runs.tiny_run import Bench

pytestmark = pytest.mark.faults


@pytest.fixture
def small() -> Iterator[Room]:
    """A place where no process of ours can go on living."""
    with room() as made:
        if isinstance(made, str):
            pytest.skip(made)
        made.limit(16)
        yield made


def run_until(
    bench: Bench, moment: Callable[[psutil.Process, str], psutil.Process | None], small: Room
) -> tuple[subprocess.Popen[bytes], str]:
    """Start the run, let the process that `moment` names run into the limit, and wait for the flow's end."""
    log = bench.folder / "killed.log"
    with log.open("wb") as output:
        flow = subprocess.Popen(
            bench.command("run", str(bench.recipe)),
            env=bench.environment(),
            cwd=bench.folder,
            stdout=output,
            stderr=output,
        )
    limit, victim = time.monotonic() + 400, None
    while victim is None:
        assert flow.poll() is None, log.read_text()
        assert time.monotonic() < limit, log.read_text()
        time.sleep(0.02)
        victim = moment(psutil.Process(flow.pid), log.read_text())
    small.takes(victim.pid)
    flow.wait(timeout=900)
    return flow, log.read_text()


def rank_of(flow: psutil.Process, said: str) -> psutil.Process | None:
    """The process that trains, once it does."""
    if "train-dpo DPO: running" not in said:
        return None
    return next(iter(jobs_among(flow.children(recursive=True))), None)


def test_a_trainer_that_the_kernel_killed_for_memory(finished, small):
    reference, whole = finished
    own = reference.copy("oom-trainer")
    forget_from(own, "train-dpo DPO")
    flow, said = run_until(own, rank_of, small)
    assert flow.returncode == 4, said
    assert "error: train-dpo DPO failed: out of memory: the kernel killed one of its processes. " in said
    for remedy in ("micro_batch_size", "pack_tokens", "engine.gradient_checkpointing=true", "dpo plan"):
        assert remedy in said
    assert "to resume: dpo run" in said
    assert not left_running(own.workspace)
    report = own.run("--resume")
    assert own.index() == reference.index()
    assert report["evaluation"] == whole["evaluation"]
    assert_store_clean(own.workspace)


def test_a_flow_that_the_kernel_killed_for_memory(finished, small):
    reference, _ = finished
    own = reference.copy("oom-flow")
    forget_from(own, "evaluate")
    flow, said = run_until(own, lambda flow, said: flow if "evaluate: running" in said else None, small)
    assert flow.returncode == -9, said
    done = own.dpo("run", str(own.recipe), "--resume")
    assert done.returncode == 0, done.stderr
    assert "which was killed or whose machine went down" in done.stderr
    assert "if memory ran out, start a new run with smaller batches" in done.stderr
    assert own.index() == reference.index()
    assert_store_clean(own.workspace)
    assert not left_running(own.workspace)
