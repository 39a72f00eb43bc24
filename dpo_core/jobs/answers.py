"""Job that generates the answers of models to the same prompts, one model after the other."""

from pathlib import Path
from typing import Any

from dpo_core.data.files.parquet import read_parquet
from dpo_core.evaluation.model_under_test import ModelUnderTest
from dpo_core.evaluation.prompt import Prompt
from dpo_core.jobs.files import AnswersJob
from dpo_core.jobs.start import device
from dpo_core.ranks import JobRanks

FILE = AnswersJob


def run(job: AnswersJob, ranks: JobRanks) -> dict[str, Any]:
    """The answers of each model, in the order of the prompts."""
    prompts = [Prompt(row["prompt"], bool(row["chat"])) for row in read_parquet(job.prompts)]
    answers = {}
    for model in job.models:
        subject = ModelUnderTest(Path(model.path), model.name, model.tokens, device=device(), ranks=ranks)
        answers[model.name] = subject.answers(prompts, job.sampling, seed=job.seed)
    return {"answers": answers}
