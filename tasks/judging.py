"""Two models answer the same prompts, and a judge says which answers are better."""

import random
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from dpo_core.data.config import DataConfig
from dpo_core.data.records import load
from dpo_core.errors import RecipeError
from dpo_core.evaluation.subject import Asked, Subject
from dpo_core.generate import SamplingConfig, seed_for
from dpo_core.judging.compare import compare_answers
from dpo_core.judging.judge import JudgeConfig
from dpo_core.judging.results import WinRate
from tasks.evaluation import readable
from tasks.report import Sample

REPLIES = "judgements"
"""Folder of the workspace that holds the judges' earlier replies."""
SHOWN = 8


def chosen_prompts(config: DataConfig, most: int, seed: int) -> list[Asked]:
    """At most so many different prompts of a data file, a seeded choice in the order of the file.

    Raises:
        RecipeError: the file has fewer than two that can be used.
    """
    frame: pd.DataFrame = load(config).frame
    frame = frame[frame["fault"] == ""].drop_duplicates(["prompt", "chat"])
    if len(frame) < 2:
        raise RecipeError(
            f"{config.path} holds {len(frame)} prompts that can be used", "Give at least two for a win rate"
        )
    kept = sorted(random.Random(seed).sample(range(len(frame)), min(most, len(frame))))
    return [Asked(row["prompt"], bool(row["chat"])) for row in frame.iloc[kept].to_dict("records")]


def judge_models(
    a: Subject,
    b: Subject,
    asked: list[Asked],
    sampling: SamplingConfig,
    judge: JudgeConfig,
    *,
    workspace: Path,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[WinRate, list[Sample]]:
    """The win rate of a over b on the prompts, and the first answers side by side.

    Args:
        progress: told how many of how many answers and questions are done.
    """
    total = 2 * len(asked)
    own = seed_for(seed, "answers")
    answers_a = a.answers(asked, sampling, seed=own, progress=lambda done: progress(done, total))
    answers_b = b.answers(asked, sampling, seed=own, progress=lambda done: progress(len(asked) + done, total))
    rate = compare_answers(
        judge,
        [one.prompt for one in asked],
        answers_a,
        answers_b,
        a=a.name,
        b=b.name,
        chat=[one.chat for one in asked],
        tokens=a.tokens,
        cache=workspace / REPLIES,
        seed=seed,
        progress=progress,
    )
    samples = [
        Sample(prompt=readable(one.prompt), completions={a.name: ours, b.name: theirs})
        for one, ours, theirs in list(zip(asked, answers_a, answers_b, strict=True))[:SHOWN]
    ]
    return rate, samples
