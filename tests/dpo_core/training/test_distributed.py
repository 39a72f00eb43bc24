"""One process, two processes and every ZeRO stage train alike; a run resumes on another number of ranks."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from safetensors.torch import load_file

from deploy.launchers import State
from dpo_core import job as train
from dpo_core.methods.ppo import PpoConfig
from dpo_core.scoring.autocast import effective_precision
from dpo_core.training.batches import Order
from dpo_core.training.config import EngineConfig
from dpo_core.training.distributed import lost_peer
from tests.support.runs import training_jobs
from tests.support.runs.training_jobs import curve, launch, pair_rows, write_job

ROWS = pair_rows(16)
STEPS = 6
NAMES = ("loss", "grad_norm", "rewards/margins", "logps/chosen", "learning_rate")

STAGES: dict[str, dict[str, Any]] = {f"zero-{stage}": {"zero_stage": stage} for stage in range(4)}
MORE: dict[str, dict[str, Any]] = {
    "zero-1-offload": {"zero_stage": 1, "offload": "optimizer"},
    "zero-2-offload": {"zero_stage": 2, "offload": "optimizer"},
    "zero-3-offload": {"zero_stage": 3, "offload": "parameters"},
    "zero-0-recompute": {"zero_stage": 0, "gradient_checkpointing": True},
    "zero-2-recompute": {"zero_stage": 2, "gradient_checkpointing": True},
    "zero-3-recompute": {"zero_stage": 3, "gradient_checkpointing": True},
}
BF16: dict[str, dict[str, Any]] = {f"bf16-{n}": s | {"precision": "bf16"} for n, s in STAGES.items()}


class Lab:
    """DPO jobs on one tiny model, each named by how it is computed."""

    def __init__(self, folder: Path, tiny: Path) -> None:
        self.folder, self.tiny = folder, tiny
        self.shard = training_jobs.write_reference(tiny, ROWS, folder / "reference")

    def job(self, name: str, **engine: Any) -> Path:
        settings = {
            "batch_size": 8,
            "micro_batch_size": 2,
            "epochs": 100.0,
            "max_steps": STEPS,
            "parameters": {"beta": 0.5},
            # Adam divides a gradient by its size: with a tiny epsilon it would blow the last bit of a
            # gradient near zero up to a whole step.
            "optim": {"learning_rate": 1e-3, "schedule": "cosine", "epsilon": 1e-6},
            "engine": {"precision": "fp32", "threads": 1, "save_every": 3} | engine,
        }
        work = self.folder / name
        return write_job(work, "dpo", self.tiny, ROWS, reference_logps=str(self.shard), settings=settings)

    def half(self, name: str, of: str, **engine: Any) -> Path:
        """A job whose work folder is as another's was after three steps."""
        path, old = self.job(name, **engine), self.folder / of
        shutil.copytree(old / "checkpoints" / "step-00000003", path.parent / "checkpoints/step-00000003")
        lines = (old / "metrics.jsonl").read_text().splitlines(keepends=True)
        (path.parent / "metrics.jsonl").write_text("".join(lines[:3]))
        return path

    def run(self, ranks: int, jobs: list[Path]) -> None:
        for job in jobs:
            assert launch(job, ranks) is State.DONE

    def gap(self, name: str, other: str) -> dict[str, float]:
        """Largest difference of two courses: of each metric, and of the weights that were written."""
        ours, theirs = curve(self.folder / name), curve(self.folder / other)
        assert len(ours) == len(theirs) == STEPS
        gaps = {n: max(abs(a[n] - b[n]) for a, b in zip(ours, theirs, strict=True)) for n in NAMES}
        left, right = (load_file(self.folder / n / "out" / "model.safetensors") for n in (name, other))
        assert left.keys() == right.keys()
        return gaps | {"weights": max(float((left[k] - right[k]).abs().max()) for k in left)}

    def assert_same(self, name: str, other: str, tolerance: float) -> None:
        gaps = self.gap(name, other)
        assert {k: v for k, v in gaps.items() if not v <= tolerance} == {}, (name, other)


@pytest.fixture(scope="module")
def lab(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("ranks"), tiny)


@pytest.fixture(scope="module")
def alone_at_each_stage(lab: Lab, _process_group: None) -> Lab:
    """Every stage in one process: this one."""
    handler = signal.getsignal(signal.SIGTERM)
    for name, how in STAGES.items():
        assert train.main(["--config", str(lab.job(f"{name}-of-1", **how))]) == 0
    signal.signal(signal.SIGTERM, handler)
    return lab


@pytest.fixture(scope="module")
def courses(alone_at_each_stage: Lab) -> Lab:
    """Every stage in one process and in two."""
    lab = alone_at_each_stage
    lab.run(2, [lab.job(f"{name}-of-2", processes=2, **how) for name, how in STAGES.items()])
    return lab


@pytest.mark.parametrize("name", ["zero-1", "zero-2", "zero-3"])
def test_stages_change_nothing(alone_at_each_stage: Lab, name: str) -> None:
    alone_at_each_stage.assert_same(f"{name}-of-1", "zero-0-of-1", tolerance=1e-5)
    losses = [line["loss"] for line in curve(alone_at_each_stage.folder / f"{name}-of-1")]
    assert losses[-1] < losses[0] - 0.01, "there was something to differ in"


def test_two_ranks_with_zero_3_change_nothing(alone_at_each_stage: Lab) -> None:
    lab = alone_at_each_stage
    lab.run(2, [lab.job("cut-up", processes=2, **STAGES["zero-3"])])
    lab.assert_same("cut-up", "zero-0-of-1", tolerance=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_two_ranks_change_nothing(courses: Lab, name: str) -> None:
    courses.assert_same(f"{name}-of-2", "zero-0-of-1", tolerance=1e-5)


@pytest.mark.slow
def test_offload_and_recomputing_change_nothing(courses: Lab) -> None:
    courses.run(1, [courses.job(f"{name}-of-1", **how) for name, how in MORE.items()])
    courses.run(2, [courses.job(f"{name}-of-2", processes=2, **how) for name, how in MORE.items()])
    for name in MORE:
        courses.assert_same(f"{name}-of-1", "zero-0-of-1", tolerance=1e-5)
        courses.assert_same(f"{name}-of-2", "zero-0-of-1", tolerance=1e-5)


@pytest.mark.slow
def test_bf16_differs_by_its_rounding_only(courses: Lab) -> None:
    """Other micro-batches are padded otherwise and round otherwise: 1e-3 is a quarter of bf16's own step."""
    courses.run(1, [courses.job(f"{name}-of-1", **how) for name, how in BF16.items()])
    courses.run(2, [courses.job(f"{name}-of-2", processes=2, **how) for name, how in BF16.items()])
    for name in ("bf16-zero-1", "bf16-zero-2"):
        courses.assert_same(f"{name}-of-1", "bf16-zero-0-of-1", tolerance=1e-5)
    for name in BF16:
        for ranks in (1, 2):
            gaps = courses.gap(f"{name}-of-{ranks}", "bf16-zero-0-of-1")
            assert gaps["loss"] < 1e-3, (name, ranks)
    apart = courses.gap("bf16-zero-0-of-1", "zero-0-of-1")
    used = effective_precision("bf16") == "bf16"
    assert (apart["logps/chosen"] > 1e-4) == used, "bf16 was really used, if the processor has it"


@pytest.mark.slow
def test_the_reward_model_is_the_same_at_every_stage(lab: Lab) -> None:
    """Its result is normalised after training, by forward passes without the engine."""

    def job(name: str, **engine: Any) -> Path:
        settings = json.loads(lab.job(name, **engine).read_text())["settings"]
        settings.pop("parameters")
        return write_job(lab.folder / name, "reward", lab.tiny, ROWS, settings=settings)

    lab.run(1, [job("reward-0", zero_stage=0), job("reward-3", zero_stage=3)])
    lab.run(2, [job(f"reward-{stage}-of-2", zero_stage=stage, processes=2) for stage in (2, 3)])
    for name in ("reward-3", "reward-2-of-2", "reward-3-of-2"):
        for ours, theirs in zip(curve(lab.folder / name), curve(lab.folder / "reward-0"), strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        for file in (lab.folder / "reward-0" / "out").rglob("*.safetensors"):
            other = load_file(lab.folder / name / file.relative_to(lab.folder / "reward-0"))
            for key, tensor in load_file(file).items():
                assert float((tensor - other[key]).abs().max()) <= 1e-5, (name, key)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tdpo2", "orpo_full"])
def test_losses_that_read_the_output_head_are_the_same_with_zero_3(lab: Lab, name: str) -> None:
    """Beside a whole live reference, and over the prompts."""

    def job(work: str, **engine: Any) -> Path:
        settings = json.loads(lab.job(work, **engine).read_text())["settings"]
        settings |= {"objective": name, "parameters": {}}
        return write_job(lab.folder / work, "dpo", lab.tiny, ROWS, reference=str(lab.tiny), settings=settings)

    whole, cut_up = f"{name}-whole", f"{name}-cut-up"
    lab.run(1, [job(whole)])
    lab.run(2, [job(cut_up, processes=2, zero_stage=3)])
    lab.assert_same(cut_up, whole, tolerance=1e-5)


# Another number of ranks ------------------------------------------------------------------------------------


def moved(lab: Lab, stages: dict[str, dict[str, Any]]) -> None:
    """Each of the runs goes on from its third step, from 2 ranks on 1 and from 1 on 2."""
    lab.run(1, [lab.half(f"{n}-2-to-1", f"{n}-of-2", **how) for n, how in stages.items()])
    lab.run(2, [lab.half(f"{n}-1-to-2", f"{n}-of-1", processes=2, **how) for n, how in stages.items()])
    for name in stages:
        for work in (f"{name}-2-to-1", f"{name}-1-to-2"):
            for straight in (f"{name}-of-1", f"{name}-of-2"):
                lab.assert_same(work, straight, tolerance=5e-6)
            left = {p.name for p in (lab.folder / work / "checkpoints").iterdir() if p.is_dir()}
            assert left == {"step-00000003", "step-00000006"}, "the converted form is not kept"


@pytest.mark.slow
def test_a_checkpoint_without_zero_resumes_on_another_number_of_ranks(courses: Lab) -> None:
    moved(courses, {"zero-0": STAGES["zero-0"]})


@pytest.mark.slow
def test_sharded_runs_resume_on_another_number_of_ranks(courses: Lab) -> None:
    moved(courses, {name: how for name, how in STAGES.items() if how["zero_stage"]})


@pytest.mark.slow
def test_offloaded_runs_resume_on_another_number_of_ranks(courses: Lab) -> None:
    offloaded = {n: how for n, how in MORE.items() if "offload" in how}
    courses.run(1, [courses.job(f"{name}-of-1", **how) for name, how in offloaded.items()])
    courses.run(2, [courses.job(f"{name}-of-2", processes=2, **how) for name, how in offloaded.items()])
    moved(courses, offloaded)


@pytest.mark.slow
def test_the_rank_that_fails_reports_the_cause(lab: Lab) -> None:
    """A reference value spoilt on disk, in a pair that only rank 1 is dealt; rank 0 merely misses rank 1."""
    job = lab.job("one-fails", processes=2)
    pairs = training_jobs.token_pairs(lab.tiny, ROWS)
    batch = [pairs[i] for i in Order(len(pairs), seed=3).batch(0, 8)]
    bad = sorted(batch, key=lambda p: max(len(p.chosen), len(p.rejected)))[1]
    training_jobs.spoil(lab.shard, pairs, bad, lab.folder / "spoilt")
    settings = json.loads(job.read_text())
    settings["reference_logps"] = str(lab.folder / "spoilt")
    settings["settings"] |= {"check_rows": 0, "pack_tokens": None}  # padded rows are dealt as above
    job.write_text(json.dumps(settings))
    with pytest.raises(AssertionError, match="lost another rank"):
        lab.run(2, [job])
    error = json.loads((job.parent / "error.json").read_text())
    assert error["problem"].startswith("the loss of step 1 is nan; its examples: ")
    assert bad.id in error["problem"]


# Refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("offload", "stage", "needed"), [("optimizer", 0, 1), ("parameters", 2, 3)])
def test_offload_without_its_stage_is_refused(offload: Any, stage: int, needed: int) -> None:
    with pytest.raises(ValidationError, match=f"offload '{offload}' needs zero_stage {needed} or more"):
        EngineConfig(offload=offload, zero_stage=stage)


def test_ppo_refuses_to_sample_from_shards() -> None:
    with pytest.raises(ValidationError, match="use zero_stage 0 to 2"):
        PpoConfig(engine={"zero_stage": 3})


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.78.0.2]:4242"), True),
        (RuntimeError("Timed out waiting 15000ms for recv operation to complete"), True),
        (ConnectionResetError(104, "Connection reset by peer"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"), False),
        (ValueError("Connection closed by peer"), False),
    ],
)
def test_a_lost_peer_is_distinguished_from_other_errors(error: Exception, lost: bool) -> None:
    rank_lost = lost_peer(error)
    assert (rank_lost is not None) == lost
    if rank_lost:
        assert "a process or node is gone, cut off" in rank_lost.problem
        assert "resume" in rank_lost.remedy
