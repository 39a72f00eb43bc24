"""Two models answer the same prompts, and a judge says which answers are better."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from dpo_core.data.config import DataConfig
from dpo_core.data.load import load
from dpo_core.data.tokens.config import TokenConfig
from dpo_core.errors import RecipeError
from dpo_core.evaluation.asked import Asked
from dpo_core.evaluation.safety_classifier import identity
from dpo_core.generation.config import SamplingConfig, seed_for
from dpo_core.jobs.files import AnswersJob, AskedModel, ScoreJob
from dpo_core.judging.compare import compare_answers
from dpo_core.judging.config import JudgeConfig
from dpo_core.judging.judge import AnswerPairs
from dpo_core.judging.results import WinRate
from dpo_core.models.source import source_digest
from dpo_core.rewards.functions import is_reward_model
from tasks.stages.asking import RunJob
from tasks.stages.base import Context, Output, Stage, StageResult, Work, run_stage, stage_task
from tasks.stages.evaluation import load_answers, rivals
from tasks.stages.suites import LEFT_OUT
from tasks.store.facts import Facts
from tasks.store.manifest import Manifest, digest_config

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


def answers_of(
    models: Sequence[AskedModel], asked: Sequence[Asked], sampling: SamplingConfig, seed: int, run: RunJob
) -> dict[str, list[str]]:
    """What each model answers to the prompts, by its name; computed in a job."""
    digests = {model.name: [source_digest(Path(model.path)), model.tokens] for model in models}
    decides = {"models": digests, "prompts": asked, "sampling": sampling, "seed": seed}

    def job(fields: dict[str, Any]) -> AnswersJob:
        table = _table(fields, pd.DataFrame(asked, columns=Asked._fields))
        own = seed_for(seed, "answers")
        return AnswersJob(**fields, models=list(models), prompts=table, sampling=sampling, seed=own)

    answers: dict[str, list[str]] = run(digest_config(decides), job, len(models) * len(asked))["answers"]
    return answers


def rewards_of(source: str, pairs: AnswerPairs, tokens: TokenConfig, run: RunJob) -> list[float]:
    """Rewards of the answers of the first model, then of the second; computed in a job.

    Args:
        source: folder of a trained reward model.

    Raises:
        RecipeError: it is none.
    """
    if not is_reward_model(source):
        raise RecipeError(
            f"'{source}' is not the folder of a trained reward model",
            "Name the folder that holds its reward.json, or set the judge's kind to reward",
        )
    sides = {"prompt": pairs.prompts, "chat": pairs.chat or [False] * len(pairs.prompts)}
    frames = [pd.DataFrame(sides | {"answer": answers}) for answers in (pairs.answers_a, pairs.answers_b)]
    rows = pd.concat(frames, ignore_index=True)
    decides = {"reward": identity(source), "rows": rows.to_dict("list"), "tokens": tokens}

    def job(fields: dict[str, Any]) -> ScoreJob:
        return ScoreJob(**fields, reward=source, answers=_table(fields, rows), tokens=tokens)

    rewards: list[float] = run(digest_config(decides), job, 1)["rewards"]
    return rewards


def _table(fields: dict[str, Any], frame: pd.DataFrame) -> str:
    """Rows that a job reads, in its work folder."""
    path = Path(fields["work"]) / "rows.parquet"
    frame.to_parquet(path, index=False)
    return str(path)


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
