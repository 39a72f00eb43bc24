"""The evaluation job: two ranks and a killed job give the numbers of one rank."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from dpo_core.evaluation.config import EvaluateConfig
from dpo_core.generation.config import SamplingConfig
from dpo_core.jobs.files import EvaluationJob
from tests.support.models.tiny import make_tiny_model
from tests.support.runs.jobs import killed_and_resumed, on, run_job_file
from tests.support.runs.training_jobs import TOKENS, pair_rows


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {name: str(make_tiny_model(folder / name, seed)) for seed, name in enumerate(("SFT", "DPO"))}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Held-out pairs of two sets, and rows that were learned from."""
    path = tmp_path_factory.mktemp("rows") / "data.parquet"
    listed = [
        row | {"split": "train" if number < 4 else "eval", "source": f"set{number % 2}"}
        for number, row in enumerate(pair_rows(20))
    ]
    pd.DataFrame(listed).to_parquet(path, index=False)
    return str(path)


def job(work: Path, models: dict[str, str], rows: str, processes: int = 1) -> EvaluationJob:
    return EvaluationJob(
        **on(work, processes),
        policies=models,
        reference=models["SFT"],
        reference_name="SFT",
        prompts=rows,
        pairs=rows,
        config=EvaluateConfig(
            prompts=8,
            samples_per_prompt=2,
            sampling=SamplingConfig(max_new_tokens=8, batch_size=3, precision="fp32"),
            precision="fp32",
            token_budget=64,
        ),
        tokens=TOKENS,
        reward="sentiment",
        seed=5,
    )


@pytest.fixture(scope="module")
def alone(models: dict[str, str], rows: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_job_file(job(tmp_path_factory.mktemp("alone"), models, rows))


def test_one_rank_measures_every_policy(alone: dict[str, Any]) -> None:
    reference, policy = (alone["policies"][name] for name in ("SFT", "DPO"))
    assert reference["samples"]["kl_k1"] == [0.0] * 16
    assert reference["accuracy"] is None
    assert policy["accuracy"]["n"] == alone["held_out_pairs"] == 16
    assert set(policy["accuracy_by_source"]) == {"set0", "set1"}
    assert min(policy["samples"]["kl_k3"]) > 0
    assert len(set(policy["samples"]["entropies"])) == 16


def test_two_ranks_that_were_killed_and_resumed_give_the_numbers_of_one(
    alone: dict[str, Any], models: dict[str, str], rows: str, tmp_path: Path
) -> None:
    assert killed_and_resumed(job(tmp_path, models, rows, 2), units=4) == alone
