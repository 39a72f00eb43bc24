"""Evaluation and pair sampling on two nodes: the numbers of one node, and what happens when one is lost."""

import json
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from dpo_core.evaluation.config import EvaluateConfig
from dpo_core.generation.config import SamplingConfig
from dpo_core.jobs.files import EvaluationJob, ModelJob, PairSamplingJob, write_job
from dpo_core.methods.pair_sampling import PairSamplingConfig
from tests.scenarios.faults.nodes import Gang, TwoNodes
from tests.support.models.tiny import make_tiny_model
from tests.support.runs.jobs import kept, on, run_job_file
from tests.support.runs.training_jobs import TOKENS, pair_rows, wait_until

pytestmark = pytest.mark.faults
WAIT = 30.0
"""Seconds after which the rest of a job must have ended when a node is lost."""
SAMPLING = SamplingConfig(max_new_tokens=24, batch_size=1, precision="fp32")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {
        name: str(make_tiny_model(folder / name, seed, taught=True))
        for seed, name in enumerate(("SFT", "DPO"))
    }


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("rows") / "data.parquet"
    listed = [
        row | {"prompt": f"{number} {row['prompt']}", "split": ("eval", "train")[number % 2], "row": number}
        for number, row in enumerate(pair_rows(80))
    ]
    pd.DataFrame(listed).to_parquet(path, index=False)
    return str(path)


def evaluation(work: Path, models: dict[str, str], rows: str) -> EvaluationJob:
    """Long enough to be interrupted."""
    return EvaluationJob(
        **on(work, 1),
        policies=models,
        reference=models["SFT"],
        reference_name="SFT",
        prompts=rows,
        pairs=rows,
        config=EvaluateConfig(samples_per_prompt=8, sampling=SAMPLING, precision="fp32", token_budget=64),
        tokens=TOKENS,
        reward="sentiment",
        seed=5,
    )


def sampling(work: Path, models: dict[str, str], rows: str) -> PairSamplingJob:
    return PairSamplingJob(
        **on(work, 1),
        prompts=rows,
        model=models["SFT"],
        out=str(work / "pairs.parquet"),
        config=PairSamplingConfig(samples_per_prompt=4, sampling=SAMPLING),
        tokens=TOKENS,
        reward="sentiment",
        seed=3,
    )


@pytest.fixture(scope="module")
def alone(models: dict[str, str], rows: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run_job_file(evaluation(tmp_path_factory.mktemp("alone"), models, rows))


def result(job: ModelJob) -> Any:
    return json.loads((Path(job.work) / "result.json").read_text())


def begun(job: ModelJob, gang: Gang) -> None:
    """Wait until both nodes have kept results; the job must not have ended before."""
    work = Path(job.work)
    wait_until(lambda: len(kept(work)) >= 2, f"the first results of\n{gang.a.text()}")
    assert not (work / "result.json").exists(), "too late to interrupt it"


def test_an_evaluation_on_two_nodes_gives_the_numbers_of_one(
    room: TwoNodes, alone: Any, models: dict[str, str], rows: str, tmp_path: Path
) -> None:
    job = evaluation(tmp_path / "work", models, rows)
    Gang(room, write_job(job)).finish()
    assert result(job) == alone


def test_pairs_sampled_on_two_nodes_are_those_of_one(
    room: TwoNodes, models: dict[str, str], rows: str, tmp_path: Path
) -> None:
    counts = run_job_file(sampling(tmp_path / "alone", models, rows))
    job = sampling(tmp_path / "two", models, rows)
    Gang(room, write_job(job)).finish()
    assert result(job) == counts
    two, one = (pd.read_parquet(tmp_path / name / "pairs.parquet") for name in ("two", "alone"))
    pd.testing.assert_frame_equal(two, one)


@pytest.mark.parametrize("how", ["killed", "cut off"])
def test_a_node_lost_during_evaluation_is_noticed_and_the_next_start_goes_on(
    room: TwoNodes, alone: Any, models: dict[str, str], rows: str, tmp_path: Path, how: str
) -> None:
    job = evaluation(tmp_path / "work", models, rows)
    gang = Gang(room, write_job(job))
    begun(job, gang)
    start = time.monotonic()
    if how == "killed":
        gang.b.kill()
    else:
        room.cut()
    assert gang.a.process.wait(timeout=600) != 0, gang.a.text()
    assert time.monotonic() - start < WAIT
    error = json.loads((tmp_path / "work" / "error.json").read_text())
    assert "lost another rank" in error["problem"]
    room.end()
    room.mend()
    before = kept(tmp_path / "work")
    Gang(room, write_job(job)).finish()
    assert result(job) == alone
    assert before.items() < kept(tmp_path / "work").items(), "nothing that was kept was computed again"


def test_a_lost_node_is_replaced_by_a_new_one(
    room: TwoNodes, alone: Any, models: dict[str, str], rows: str, tmp_path: Path
) -> None:
    job = evaluation(tmp_path / "work", models, rows)
    gang = Gang(room, write_job(job), restarts=3)
    begun(job, gang)
    gang.b.kill()
    gang.b = gang.start("b")
    gang.finish()
    assert result(job) == alone
