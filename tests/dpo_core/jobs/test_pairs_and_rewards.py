"""Jobs that share samples and scores: two ranks and a killed job give what one rank gives."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from dpo_core.generation.config import SamplingConfig
from dpo_core.jobs.files import PairSamplingJob, RewardQualityJob
from dpo_core.methods.pair_sampling import PairSamplingConfig
from dpo_core.models.load import load_model, load_tokenizer
from dpo_core.models.reward_model import RewardModel
from tests.support.models.tiny import make_tiny_model
from tests.support.runs.jobs import killed_and_resumed, on, run_job_file
from tests.support.runs.training_jobs import TOKENS, pair_rows


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("rows") / "data.parquet"
    listed = [
        row | {"row": number, "split": "train" if number % 3 else "eval"}
        for number, row in enumerate(pair_rows(24))
    ]
    pd.DataFrame(listed).to_parquet(path, index=False)
    return str(path)


def sampling_job(work: Path, model: Path, rows: str, processes: int) -> PairSamplingJob:
    return PairSamplingJob(
        **on(work, processes),
        prompts=rows,
        model=str(model),
        out=str(work / "pairs.parquet"),
        config=PairSamplingConfig(
            samples_per_prompt=3, sampling=SamplingConfig(max_new_tokens=8, batch_size=4, precision="fp32")
        ),
        tokens=TOKENS,
        reward="sentiment",
        seed=3,
    )


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose samples a reward tells apart."""
    return make_tiny_model(tmp_path_factory.mktemp("taught") / "model", taught=True)


@pytest.fixture(scope="module")
def sampled(taught: Path, rows: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, pd.DataFrame]:
    work = tmp_path_factory.mktemp("alone")
    return run_job_file(sampling_job(work, taught, rows, 1)), pd.read_parquet(work / "pairs.parquet")


def test_pairs_keep_the_split_of_their_prompt(sampled: tuple[Any, pd.DataFrame], rows: str) -> None:
    counts, pairs = sampled
    assert counts["samples"] == 72
    assert 0 < counts["pairs"] == len(pairs)
    splits = pd.read_parquet(rows).set_index("row")["split"]
    assert (pairs["split"].to_numpy() == splits[pairs["row"]].to_numpy()).all()


def test_two_ranks_that_were_killed_and_resumed_make_the_pairs_of_one(
    sampled: tuple[Any, pd.DataFrame], taught: Path, rows: str, tmp_path: Path
) -> None:
    counts, pairs = sampled
    assert killed_and_resumed(sampling_job(tmp_path, taught, rows, 2), units=3) == counts
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "pairs.parquet"), pairs)


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward")
    base = make_tiny_model(folder / "base", 7)
    model = RewardModel(load_model(base).get_decoder(), torch.Generator().manual_seed(1))
    model.save(folder / "model")
    load_tokenizer(base).save_pretrained(folder / "model")
    return folder / "model"


def quality_job(work: Path, model: Path, rows: str, processes: int) -> RewardQualityJob:
    return RewardQualityJob(
        **on(work, processes), model=str(model), pairs=rows, tokens=TOKENS, precision="fp32", seed=0
    )


def test_the_quality_of_a_reward_model_does_not_depend_on_ranks(
    reward_model: Path, rows: str, tmp_path: Path
) -> None:
    alone = run_job_file(quality_job(tmp_path / "alone", reward_model, rows, 1))
    assert alone["accuracy"]["n"] == 8
    assert run_job_file(quality_job(tmp_path / "two", reward_model, rows, 2)) == alone
