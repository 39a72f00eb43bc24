"""The answers job: two ranks and a killed job give the answers of one process."""

from pathlib import Path

import pandas as pd

from dpo_core.data.tokens.config import TokenConfig
from dpo_core.evaluation.model_under_test import ModelUnderTest
from dpo_core.evaluation.prompt import Prompt
from dpo_core.generation.config import SamplingConfig
from dpo_core.jobs.files import AnswersJob, NamedModel
from tests.support.models.tiny import make_tiny_model
from tests.support.runs.jobs import killed_and_resumed, on

ASKED = [Prompt("The film was", False), Prompt('[{"role": "user", "content": "Say good."}]', True)] * 4


def test_a_killed_job_on_two_ranks_gives_the_answers_of_one_process(tmp_path: Path) -> None:
    tokens = TokenConfig(max_length=64, max_prompt_length=32)
    sampling = SamplingConfig(max_new_tokens=8, batch_size=2, precision="fp32")
    folders = {name: make_tiny_model(tmp_path / name, seed) for seed, name in enumerate(("one", "two"))}
    pd.DataFrame(ASKED).to_parquet(tmp_path / "prompts.parquet")
    job = AnswersJob(
        **on(tmp_path / "work", 2),
        models=[NamedModel(name=name, path=str(path), tokens=tokens) for name, path in folders.items()],
        prompts=str(tmp_path / "prompts.parquet"),
        sampling=sampling,
        seed=7,
    )
    answers = killed_and_resumed(job, units=3)["answers"]
    for name, path in folders.items():
        assert answers[name] == ModelUnderTest(path, name, tokens).answers(ASKED, sampling, seed=7)
    assert answers["one"] != answers["two"]
    assert len(set(answers["one"])) == len(ASKED), "the same prompt is answered anew each time"
