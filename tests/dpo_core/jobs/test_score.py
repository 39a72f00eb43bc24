"""The score job: rewards of a model and of a function, on one rank and on two."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from dpo_core.data.tokens.config import TokenConfig
from dpo_core.data.tokens.sequences import TokenSequence
from dpo_core.jobs.files import ScoreJob
from dpo_core.models.load import load_model, load_tokenizer
from dpo_core.models.reward_model import RewardModel
from dpo_core.rewards.model import score
from tests.support.runs.jobs import killed_and_resumed, on, run_job_file

PROMPTS = ["The film was", "I ordered the soup", "After two weeks"] * 4
ANSWERS = [" good", "", " bad", " bad.", " and it came", " nice" * 9] * 2


@pytest.fixture(scope="module")
def reward(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("reward")
    RewardModel(load_model(tiny).get_decoder(), torch.Generator().manual_seed(0)).save(folder)
    load_tokenizer(tiny).save_pretrained(folder)
    (folder / "reward.json").write_text("{}")
    return str(folder)


def job(work: Path, reward: str, processes: int = 1, answers: list[str] = ANSWERS, **tokens: int) -> ScoreJob:
    path = work / "answers.parquet"
    prompts = (PROMPTS * 4)[: len(answers)]
    pd.DataFrame({"prompt": prompts, "chat": False, "answer": answers}).to_parquet(path)
    return ScoreJob(**on(work, processes), reward=reward, answers=str(path), tokens=TokenConfig(**tokens))


def test_rewards_are_those_of_the_model_whatever_the_ranks(reward: str, tiny: Path, tmp_path: Path) -> None:
    found = run_job_file(job(tmp_path, reward, 2))["rewards"]
    tokenizer = load_tokenizer(tiny)
    rows = [
        TokenSequence(tuple(tokenizer.encode(prompt)), (*tokenizer.encode(answer), tokenizer.eos_token_id))
        for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)
    ]
    assert found == score(RewardModel.load(Path(reward)), rows, "fp32")
    assert len(set(found)) == 6, "six different rows"


def test_long_prompts_are_truncated_and_a_killed_job_resumes(reward: str, tmp_path: Path) -> None:
    long = [answer * 300 for answer in ANSWERS] * 4  # several batches for each rank
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    for folder in (alone, killed):
        folder.mkdir()
    limits = {"max_length": 512, "max_prompt_length": 24}
    expected = run_job_file(job(alone, reward, 1, long, **limits))
    assert killed_and_resumed(job(killed, reward, 2, long, **limits), units=1) == expected


def test_a_function_sees_all_answers_at_once_on_one_rank(tmp_path: Path) -> None:
    path = tmp_path / "judge.py"
    path.write_text(
        "def rank(prompts, answers):\n    return [sorted(answers).index(answer) for answer in answers]\n"
    )
    found: dict[str, Any] = run_job_file(job(tmp_path, f"{path}:rank", 2))
    assert found == {"rewards": [float(sorted(ANSWERS).index(answer)) for answer in ANSWERS]}
    assert json.loads((tmp_path / "result.json").read_text()) == found
