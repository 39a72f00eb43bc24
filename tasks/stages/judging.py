"""Two models answer the same prompts, and a judge says which answers are better."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from dpo_core.data.config import DataConfig
from dpo_core.data.load import load
from dpo_core.errors import RecipeError
from dpo_core.evaluation.model_under_test import Asked, Subject
from dpo_core.generation.config import SamplingConfig, seed_for
from dpo_core.judging.compare import compare_answers
from dpo_core.judging.config import JudgeConfig
from dpo_core.judging.judge import AnswerPairs
from dpo_core.judging.results import WinRate
from tasks.reports.run_report import Sample
from tasks.stages.base import Context, Output, Stage, StageResult, Work, run_stage, stage_task
from tasks.stages.evaluation import load_answers, readable, rivals
from tasks.stages.suites import LEFT_OUT
from tasks.store.facts import Facts
from tasks.store.manifest import Manifest

JUDGE = Stage("judge", 1, "win-rates", Facts, lambda workload, label: LEFT_OUT)
REPLIES = "judgements"
"""Folder of the workspace that holds the judges' earlier replies."""


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
    models: tuple[Subject, Subject],
    asked: list[Asked],
    sampling: SamplingConfig,
    judge: JudgeConfig,
    *,
    workspace: Path,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[WinRate, list[Sample]]:
    """The win rate of the first model over the second on the prompts, and all answers side by side.

    Args:
        progress: told how many of how many answers and questions are done.
    """
    a, b = models
    own = seed_for(seed, "answers")
    answers_a = a.answers(asked, sampling, seed=own)
    answers_b = b.answers(asked, sampling, seed=own)
    prompts, chat = [one.prompt for one in asked], [one.chat for one in asked]
    rate = compare_answers(
        judge,
        AnswerPairs(a.name, b.name, prompts, answers_a, answers_b, chat),
        tokens=a.tokens,
        cache=workspace / REPLIES,
        seed=seed,
        progress=progress,
    )
    samples = [
        Sample(prompt=readable(one.prompt), completions={a.name: ours, b.name: theirs})
        for one, ours, theirs in zip(asked, answers_a, answers_b, strict=True)
    ]
    return rate, samples


@stage_task(JUDGE.name)
def judge_policies(context: Context, evaluation: Manifest, config: JudgeConfig, seed: int) -> StageResult:
    """Win rates of every policy over the reference, and over the champion where there is one.

    Args:
        evaluation: what the policies answered to the held-out prompts.
    """

    def work(given: Work) -> Output:
        answered = load_answers(evaluation)
        prompts = [answered.prompts[i] for i in answered.prompt_index]
        against = rivals(list(answered.answers))
        bar = given.progress(len(against))
        rates = []
        for number, (name, rival) in enumerate(against):
            rate = compare_answers(
                config,
                AnswerPairs(
                    name,
                    rival,
                    prompts,
                    answered.answers[name],
                    answered.answers[rival],
                    clusters=answered.prompt_index,
                ),
                cache=context.workspace / REPLIES,
                seed=seed,
            )
            rates.append(rate)
            bar.update(number + 1)
        out = given.fresh("out")
        listed = [rate.model_dump(mode="json") for rate in rates]
        (out / "win_rates.json").write_text(json.dumps(listed, ensure_ascii=False), encoding="utf-8")
        metrics = {f"judge/{rate.a.lower()}-over-{rate.b.lower()}": rate.rate.value for rate in rates}
        return Output(out, rows=len(prompts), metrics=metrics)

    slice_ = {"config": config.model_dump(mode="json"), "seed": seed}
    return run_stage(context, JUDGE, {"evaluation": evaluation}, slice_, work)


def load_win_rates(manifest: Manifest) -> list[WinRate]:
    """What the stage wrote."""
    listed = json.loads((manifest.path / "win_rates.json").read_text(encoding="utf-8"))
    return [WinRate.model_validate(one) for one in listed]
