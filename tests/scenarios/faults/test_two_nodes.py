"""Training on two nodes: the same course as on one, and what happens when one is lost.

The nodes are real network namespaces with one rank each, started by torchrun with a c10d rendezvous.
"""

import signal
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.scenarios.faults.nodes import Gang, TwoNodes
from tests.support.models.tiny import make_tiny_model
from tests.support.runs import training_jobs
from tests.support.runs.training_jobs import curve, launch, pair_rows, timeless, wait_until, write_job

pytestmark = pytest.mark.faults
REPOSITORY = Path(__file__).resolve().parents[3]
ROWS = pair_rows(16)
STEPS = 60
WAIT = 30.0
"""Seconds after which the rest of a job must have ended when a node is lost."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def shard(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return training_jobs.write_reference(model, ROWS, tmp_path_factory.mktemp("reference") / "shard")


def job(folder: Path, model: Path, shard: Path, **engine: Any) -> Path:
    settings = {
        "batch_size": 8,
        "micro_batch_size": 2,
        "epochs": 100.0,
        "max_steps": STEPS,
        "parameters": {"beta": 0.5},
        # See tests/dpo_core/training/test_distributed.py.
        "optim": {"learning_rate": 1e-3, "schedule": "cosine", "epsilon": 1e-6},
        "engine": {"precision": "fp32", "threads": 1, "save_every": 5, "zero_stage": 2} | engine,
    }
    return write_job(folder, "dpo", model, ROWS, reference_logps=str(shard), settings=settings)


def until(gang: Gang, step: int) -> None:
    """Wait for a step; the run must not have ended before."""
    wait_until(lambda: len(curve(gang.work)) >= step, f"step {step} of\n{gang.a.text()}")
    assert len(curve(gang.work)) < STEPS, "too late to interrupt it"


def assert_identical(work: Path, straight: Path) -> None:
    assert timeless(work) == timeless(straight)
    assert len(curve(work)) == STEPS
    ours, theirs = (load_file(w / "out" / "model.safetensors") for w in (work, straight))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].equal(tensor), name


@pytest.fixture(scope="module")
def straight(_room: TwoNodes, model: Path, shard: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run on two nodes."""
    work = tmp_path_factory.mktemp("straight")
    Gang(_room, job(work, model, shard)).finish()
    return work


@pytest.fixture(scope="module")
def single(model: Path, shard: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run in one process."""
    work = tmp_path_factory.mktemp("single")
    launch(job(work, model, shard, zero_stage=0))
    return work


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_nodes_take_the_course_of_one_process(
    room: TwoNodes, single: Path, model: Path, shard: Path, tmp_path: Path, stage: int
) -> None:
    Gang(room, job(tmp_path, model, shard, zero_stage=stage)).finish()
    ours, theirs = curve(tmp_path), curve(single)
    assert len(ours) == len(theirs) == STEPS
    for name in ("loss", "grad_norm", "rewards/margins", "learning_rate"):
        gap = max(abs(a[name] - b[name]) for a, b in zip(ours, theirs, strict=True))
        assert gap <= 1e-5, name
    weights = [load_file(w / "out" / "model.safetensors") for w in (tmp_path, single)]
    assert max(float((weights[0][k] - weights[1][k]).abs().max()) for k in weights[1]) <= 1e-5


def test_a_killed_node_ends_the_other_and_the_run_resumes_exactly(
    room: TwoNodes, straight: Path, model: Path, shard: Path, tmp_path: Path
) -> None:
    gang = Gang(room, job(tmp_path, model, shard))
    until(gang, 7)
    gang.b.kill()
    assert gang.left_after(gang.a) < WAIT
    assert "rank 0 lost another rank: a process or node is gone" in gang.error()["problem"]
    assert "resume the run" in gang.error()["remedy"]
    assert "rank 0 lost another rank" in gang.a.text()
    assert not (tmp_path / "result.json").exists()
    Gang(room, gang.job).finish()
    assert_identical(tmp_path, straight)


def test_the_node_that_hosts_the_rendezvous_is_killed(
    room: TwoNodes, straight: Path, model: Path, shard: Path, tmp_path: Path
) -> None:
    gang = Gang(room, job(tmp_path, model, shard))
    until(gang, 7)
    gang.a.kill()
    assert gang.left_after(gang.b) < WAIT
    assert "rank 1 lost another rank" in gang.error()["problem"]
    Gang(room, gang.job).finish()
    assert_identical(tmp_path, straight)


def test_a_node_that_is_cut_off_ends_the_other_and_the_run_resumes_exactly(
    room: TwoNodes, straight: Path, model: Path, shard: Path, tmp_path: Path
) -> None:
    """With the settings as they come."""
    gang = Gang(room, job(tmp_path, model, shard))
    until(gang, 7)
    start = time.monotonic()
    room.cut()
    for node, rank in ((gang.a, 0), (gang.b, 1)):
        gang.left_after(node)
        assert time.monotonic() - start < WAIT
        assert f"rank {rank} lost another rank: a process or node is gone or cut off" in node.text()
    assert "lost another rank" in gang.error()["problem"]
    assert not (tmp_path / "result.json").exists()
    room.mend()
    Gang(room, job(tmp_path, model, shard)).finish()
    assert_identical(tmp_path, straight)


def test_a_rank_that_stands_still_for_longer_than_silence_is_borne_is_not_lost(
    room: TwoNodes, straight: Path, model: Path, shard: Path, tmp_path: Path
) -> None:
    gang = Gang(room, job(tmp_path, model, shard, lost_after_seconds=1))
    for step, node in ((7, gang.a), (12, gang.b)):
        until(gang, step)
        worker = node.worker()
        worker.suspend()
        time.sleep(4)
        worker.resume()
    gang.finish()
    assert_identical(tmp_path, straight)


@pytest.mark.parametrize("end", ["b", "a"])
def test_a_killed_worker_is_replaced_and_the_run_goes_on(
    room: TwoNodes, straight: Path, model: Path, shard: Path, tmp_path: Path, end: str
) -> None:
    gang = Gang(room, job(tmp_path, model, shard), restarts=3)
    until(gang, 7)
    getattr(gang, end).worker().kill()
    gang.finish()
    assert "resuming from" in gang.a.text()
    assert not (tmp_path / "error.json").exists(), "what the replaced ranks left"
    assert_identical(tmp_path, straight)


def test_a_killed_node_is_replaced_and_the_run_goes_on(
    room: TwoNodes, straight: Path, model: Path, shard: Path, tmp_path: Path
) -> None:
    gang = Gang(room, job(tmp_path, model, shard), restarts=3)
    until(gang, 7)
    gang.b.kill()
    time.sleep(3)
    gang.b = gang.start("b")
    gang.finish()
    assert "resuming from" in gang.a.text()
    assert_identical(tmp_path, straight)


def test_a_link_that_comes_back_in_time_lets_the_run_go_on(
    room: TwoNodes, straight: Path, model: Path, shard: Path, tmp_path: Path
) -> None:
    gang = Gang(room, job(tmp_path, model, shard), restarts=3)
    until(gang, 7)
    room.cut()
    wait_until(
        lambda: all("lost another" in n.text() for n in (gang.a, gang.b)), "the end of both ranks", WAIT
    )
    time.sleep(10)
    room.mend()
    gang.finish()
    assert "resuming from" in gang.b.text()
    assert_identical(tmp_path, straight)


@pytest.mark.parametrize(("restarts", "told"), [(0, "b"), (3, "b"), (3, "a"), (3, "ab")])
def test_sigterm_saves_and_ends_both_nodes_and_the_run_resumes_exactly(
    room: TwoNodes, straight: Path, model: Path, shard: Path, tmp_path: Path, restarts: int, told: str
) -> None:
    """It is enough to tell one node."""
    gang = Gang(room, job(tmp_path, model, shard), restarts)
    until(gang, 7)
    for end in told:
        getattr(gang, end).torchrun().send_signal(signal.SIGTERM)
    start = time.monotonic()
    for node in (gang.a, gang.b):
        node.process.wait(timeout=start + WAIT - time.monotonic())
    assert (tmp_path / "stopped").exists()
    assert not (tmp_path / "error.json").exists()
    done = len(curve(tmp_path))
    assert (tmp_path / "checkpoints" / f"step-{done:08d}").is_dir(), "saved at the step that was at hand"
    assert 7 <= done < STEPS
    Gang(room, gang.job).finish()
    assert_identical(tmp_path, straight)
