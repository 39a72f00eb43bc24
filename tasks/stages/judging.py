"""Win rates by a judge: collect the answers of two models to the same prompts and have them judged."""

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
from dpo_core.evaluation.prompt import Prompt
from dpo_core.evaluation.safety_classifier import identity
from dpo_core.generation.config import SamplingConfig, seed_for
from dpo_core.jobs.files import AnswersJob, NamedModel, ScoreJob
from dpo_core.judging.config import JudgeConfig
from dpo_core.judging.judge import AnswerPairs, compare_answers
from dpo_core.judging.results import WinRate
from dpo_core.models.source import source_digest
from dpo_core.rewards.functions import is_reward_model
from dpo_core.system import digest_json
from tasks.stages.base import Context, Output, RunningStage, Stage, StageResult, run_stage, stage_task
from tasks.stages.evaluation import load_answers, rivals
from tasks.stages.model_jobs import RunJob
from tasks.stages.suites import NOT_ESTIMATED
from tasks.store.facts import Facts
from tasks.store.files import REPLIES
from tasks.store.manifest import Manifest

JUDGE = Stage("judge", 1, "win-rates", Facts, lambda run, label: NOT_ESTIMATED)


def chosen_prompts(config: DataConfig, most: int, seed: int) -> list[Prompt]:
    """At most `most` distinct prompts of a data file, chosen by the seed, in the order of the file.

    Raises:
        RecipeError: the file has fewer than two usable prompts.
    """
    frame: pd.DataFrame = load(config).frame
    frame = frame[frame["fault"] == ""].drop_duplicates(["prompt", "chat"])
    if len(frame) < 2:
        raise RecipeError(
            f"{config.path} has {len(frame)} usable prompts", "Give at least two for a win rate"
        )
    chosen = sorted(random.Random(seed).sample(range(len(frame)), min(most, len(frame))))
    return [Prompt(row["prompt"], bool(row["chat"])) for row in frame.iloc[chosen].to_dict("records")]


def answers_of(
    models: Sequence[NamedModel], prompts: Sequence[Prompt], sampling: SamplingConfig, seed: int, run: RunJob
) -> dict[str, list[str]]:
    """The answers of each model to the prompts, by the model's name; computed in a job."""
    digests = {model.name: [source_digest(Path(model.path)), model.tokens] for model in models}
    decides = {"models": digests, "prompts": prompts, "sampling": sampling, "seed": seed}

    def job(fields: dict[str, Any]) -> AnswersJob:
        table = _table(fields, pd.DataFrame(prompts, columns=Prompt._fields))
        own = seed_for(seed, "answers")
        return AnswersJob(**fields, models=list(models), prompts=table, sampling=sampling, seed=own)

    answers: dict[str, list[str]] = run(digest_json(decides), job, len(models) * len(prompts))["answers"]
    return answers


def rewards_of(source: str, pairs: AnswerPairs, tokens: TokenConfig, run: RunJob) -> list[float]:
    """Rewards of the answers of the first model, then of the second; computed in a job.

    Args:
        source: folder of a trained reward model.

    Raises:
        RecipeError: the folder is no reward model.
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

    rewards: list[float] = run(digest_json(decides), job, 1)["rewards"]
    return rewards


def _table(fields: dict[str, Any], frame: pd.DataFrame) -> str:
    """Write the rows that a job reads into its work folder; returns the path."""
    path = Path(fields["work"]) / "rows.parquet"
    frame.to_parquet(path, index=False)
    return str(path)


@stage_task(JUDGE.name)
def judge_policies(context: Context, evaluation: Manifest, config: JudgeConfig, seed: int) -> StageResult:
    """Win rates of every policy over the reference, and over the champion if there is one.

    Args:
        evaluation: artifact of the evaluation stage, with the answers to the held-out prompts.
    """

    def compute(running: RunningStage) -> Output:
        answers = load_answers(evaluation)
        prompts = [answers.prompts[i] for i in answers.prompt_index]
        against = rivals(list(answers.answers))
        bar = running.progress(len(against), "comparisons")
        rates = []
        for number, (name, rival) in enumerate(against):
            rate = compare_answers(
                config,
                AnswerPairs(
                    name,
                    rival,
                    prompts,
                    answers.answers[name],
                    answers.answers[rival],
                    clusters=answers.prompt_index,
                ),
                cache=context.workspace / REPLIES,
                seed=seed,
            )
            rates.append(rate)
            bar.update(number + 1)
        out = running.empty_folder("out")
        listed = [rate.model_dump(mode="json") for rate in rates]
        (out / "win_rates.json").write_text(json.dumps(listed, ensure_ascii=False), encoding="utf-8")
        metrics = {f"judge/{rate.a.lower()}-over-{rate.b.lower()}": rate.rate.value for rate in rates}
        return Output(out, rows=len(prompts), metrics=metrics)

    key_settings = {"config": config.model_dump(mode="json"), "seed": seed}
    return run_stage(context, JUDGE, {"evaluation": evaluation}, key_settings, compute)


def load_win_rates(manifest: Manifest) -> list[WinRate]:
    """Read the win rates that the stage wrote."""
    listed = json.loads((manifest.path / "win_rates.json").read_text(encoding="utf-8"))
    return [WinRate.model_validate(rate) for rate in listed]
