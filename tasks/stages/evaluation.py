"""The evaluation stage: the reference, the policies and the champion on the same held-out prompts."""

import json
import logging
import re
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

import pandas as pd

from dpo_core.config import Config
from dpo_core.data.tokens.config import TokenConfig
from dpo_core.data.tokens.sequences import TokenSequence as Ids
from dpo_core.evaluation.config import EvaluateConfig
from dpo_core.evaluation.policy_row import VERSION, PolicyRow
from dpo_core.evaluation.summary import PolicySamples, summarise_samples
from dpo_core.images.files import names_image
from dpo_core.jobs.files import EvaluationJob
from dpo_core.judging.judge import AnswerPairs, judge_by_scores, win_rate
from dpo_core.judging.results import WinRate
from dpo_core.rewards.functions import reward_identity
from dpo_core.statistics.estimates import Estimate, paired_bootstrap
from tasks.recipe.policies import CHAMPION, REFERENCE
from tasks.reports.run_report import EvaluationDetails, Sample, Turn
from tasks.stages.base import Context, Output, RunningStage, Stage, StageResult, run_stage, stage_task
from tasks.stages.data import kind_of
from tasks.stages.job import common_fields, run_model_job
from tasks.store.facts import Facts
from tasks.store.manifest import Manifest
from tasks.tracking.mlflow_run import metric_keys

log = logging.getLogger("dpo")

FILE, ANSWERS_FILE = "evaluation.json", "answers.json"
EVALUATE = Stage(
    "evaluate",
    VERSION,
    "evaluation",
    Facts,
    lambda w, _: w.evaluation_work(1 + len(w.recipe.policies)),
    overhead=5.0,
    job="shared",
)


@dataclass(frozen=True)
class EvaluationSettings:
    """Everything that decides an evaluation apart from the models and the data."""

    config: EvaluateConfig
    tokens: TokenConfig
    seed: int
    """Seed of the samples; the same for every policy, so that differences are paired."""
    reward: str | None
    """The known reward, if there is one."""

    def as_key(self, exclude: Set[str] = frozenset()) -> dict[str, Any]:
        """The settings as part of a stage's key, without fields of `config` that the stage does not read."""
        return {
            "config": self.config.model_dump(mode="json", exclude=set(exclude)),
            "tokens": self.tokens.model_dump(mode="json"),
            "reward": reward_identity(self.reward),
            "seed": self.seed,
        }


class PolicyAnswers(Config):
    """The answers of all policies, with their rewards."""

    prompts: list[str]
    prompt_index: list[int]
    """The prompt of each answer, as an index into `prompts`."""
    answers: dict[str, list[str]]
    """By policy."""
    rewards: dict[str, list[float]]


@stage_task(EVALUATE.name)
def evaluate(
    context: Context,
    policies: dict[str, Manifest],
    prompts: Manifest,
    pairs: Manifest,
    reward_model: Manifest | None,
    settings: EvaluationSettings,
) -> StageResult:
    """Measure reward, KL, win rate, length, distinct-2 and preference accuracy with 95 % intervals.

    Args:
        policies: checkpoint of each policy by name; `SFT` is the reference, `Champion` the registered model.
        pairs: the training rows; the preference accuracy is measured if they are pairs.
    """

    def compute(running: RunningStage) -> Output:
        measured, answers, flops = _evaluate(running, policies, prompts, pairs, reward_model, settings)
        out = running.empty_folder("out")
        (out / FILE).write_text(measured.model_dump_json(indent=1, exclude_unset=True))
        (out / ANSWERS_FILE).write_text(json.dumps(answers.model_dump(), ensure_ascii=False, allow_nan=False))
        running.mlflow.artifact(out / FILE)
        metrics = {"cost/flops": flops}
        keys = metric_keys(row.name for row in measured.policies)
        for row in measured.policies:
            metrics |= {f"{name}/{keys[row.name]}": value for name, value in row.values().items()}
        for name, by_source in measured.accuracy_by_source.items():
            for source, accuracy in by_source.items():
                # MLflow allows no other characters; the end of a long path is the most specific.
                label = re.sub(r"[^\w. -]", "_", source)[-60:]
                metrics[f"accuracy/{keys[name]}/{label}"] = accuracy.value
        return Output(out, rows=measured.n_prompts, facts=Facts(flops=flops), metrics=metrics)

    inputs = {f"policy-{name}": manifest for name, manifest in policies.items()}
    inputs |= {"prompts": prompts, kind_of(pairs): pairs}
    if reward_model:
        inputs["reward_model"] = reward_model
    return run_stage(context, EVALUATE, inputs, settings.as_key(), compute)


def _evaluate(
    running: RunningStage,
    policies: dict[str, Manifest],
    prompts: Manifest,
    pairs: Manifest,
    reward_model: Manifest | None,
    settings: EvaluationSettings,
) -> tuple[EvaluationDetails, PolicyAnswers, float]:
    """The measurements, all answers, and the floating-point operations of the job."""
    config, seed = settings.config, settings.seed
    result = run_evaluation(
        running,
        prompts,
        settings,
        {
            "policies": {name: str(manifest.path) for name, manifest in policies.items()},
            "reference": str(policies[REFERENCE].path),
            "reference_name": REFERENCE,
            "pairs": str(pairs.path / "data.parquet"),
            "reward": str(reward_model.path) if reward_model else str(settings.reward),
        },
    )
    by_policy, texts = result["policies"], result["prompts"]
    samples = {name: read_samples(facts["samples"]) for name, facts in by_policy.items()}
    table = []
    for name, facts in by_policy.items():
        baseline = None if name == REFERENCE else samples[REFERENCE]
        row = summarise_samples(
            samples[name], baseline, seed=seed, length=config.sampling.max_new_tokens, name=name
        )
        accuracy = None if name == REFERENCE else facts["accuracy"]
        table.append(PolicyRow(name=name, **row, accuracy=accuracy))
    reward_name = "reward model" if reward_model else str(settings.reward)
    measured = EvaluationDetails(
        reward_name=reward_name,
        reward_is_true=reward_model is None,
        n_prompts=len(texts),
        samples_per_prompt=config.samples_per_prompt,
        held_out_pairs=result["held_out_pairs"],
        accuracy_by_source={
            name: facts["accuracy_by_source"]
            for name, facts in by_policy.items()
            if facts["accuracy_by_source"]
        },
        policies=table,
        samples=_side_by_side(samples, texts, config.shown, result["images"]),
        gain_over_champion=_gain_over_champion(samples, seed),
        win_rates=_win_rates(samples, texts, reward_name, seed),
    )
    answers = PolicyAnswers(
        prompts=texts,
        prompt_index=samples[REFERENCE].prompt_index,
        answers={name: drawn.texts for name, drawn in samples.items()},
        rewards={name: drawn.rewards for name, drawn in samples.items()},
    )
    return measured, answers, result["flops"]


def run_evaluation(
    running: RunningStage, prompts: Manifest, settings: EvaluationSettings, job: dict[str, Any]
) -> dict[str, Any]:
    """Run the evaluation job and return its result; see `dpo_core.jobs.evaluate`.

    Args:
        job: the other fields of `EvaluationJob`.
    """
    rows = prompts.path / "data.parquet"
    file = EvaluationJob(
        **common_fields(running),
        prompts=str(rows),
        config=settings.config,
        tokens=settings.tokens,
        seed=settings.seed,
        **job,
    )
    held_out = pd.read_parquet(rows, columns=["split"])["split"].eq("eval").sum()
    answers = min(int(held_out), settings.config.prompts) * settings.config.samples_per_prompt
    return run_model_job(running, file, total=len(file.policies) * answers, unit="answers")


def read_samples(facts: dict[str, Any]) -> PolicySamples:
    """The samples of a policy, from the result of the evaluation job."""
    sequences = [Ids(tuple(s["prompt"]), tuple(s["completion"])) for s in facts["sequences"]]
    return PolicySamples(**{**facts, "sequences": sequences})


def _win_rates(samples: dict[str, Any], prompts: Sequence[str], judge: str, seed: int) -> list[WinRate]:
    """Win rates by the reward: every policy against the reference, and against the champion if any.

    Images of a diffusion model have no lengths to control for; their win rates are in the table of policies.
    """
    rates: list[WinRate] = []
    if not all(drawn.sequences for drawn in samples.values()):
        return rates
    for name, rival in rivals(list(samples)):
        drawn, other = samples[name], samples[rival]
        index = drawn.prompt_index
        texts = [prompts[i] for i in index]
        pairs = AnswerPairs(name, rival, texts, drawn.texts, other.texts, clusters=index)
        judgements = judge_by_scores(drawn.rewards, other.rewards, judge)
        rates.append(win_rate(judgements, pairs, judge=judge, seed=seed))
    return rates


def rivals(policies: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs to compare: every policy with the reference, then with the champion if there is one."""
    return [
        (name, rival)
        for rival in (REFERENCE, CHAMPION)
        for name in policies
        if rival in policies and name not in (REFERENCE, rival)
    ]


def _gain_over_champion(samples: dict[str, Any], seed: int) -> dict[str, Estimate]:
    """The gain of each policy over the champion on the same prompts; empty without a champion."""
    champion = samples.get(CHAMPION)
    if champion is None:
        return {}
    return {
        name: paired_bootstrap(drawn.rewards, champion.rewards, drawn.prompt_index, seed=seed)
        for name, drawn in samples.items()
        if name not in (REFERENCE, CHAMPION)
    }


def _side_by_side(
    samples: dict[str, PolicySamples],
    prompts: Sequence[str],
    shown: int,
    images: Sequence[dict[str, list[str]]],
) -> list[Sample]:
    """The first sample of each policy for the first prompts; of images all samples."""
    table = []
    for index in range(min(shown, len(prompts))):
        texts, rewards = {}, {}
        for name, drawn in samples.items():
            first = drawn.prompt_index.index(index)
            texts[name] = drawn.texts[first]
            rewards[name] = drawn.rewards[first]
        sample = Sample(prompt=readable(prompts[index]), completions=texts, rewards=rewards)
        table.append(sample.model_copy(update={"images": images[index]}) if images else sample)
    return table


def readable(prompt: str) -> str:
    """A prompt as text for people; each turn of a conversation begins a line."""
    return "\n".join(f"{turn.role}: {turn.content}" for turn in turns_of(prompt)) or prompt


def turns_of(prompt: str) -> list[Turn]:
    """The messages of a conversation; empty for plain text."""
    try:
        return [Turn(role=turn["role"], content=str(turn["content"] or "")) for turn in json.loads(prompt)]
    except (ValueError, TypeError, KeyError):
        return []


def with_data(samples: Sequence[Sample], prompts: Sequence[str], rows: pd.DataFrame) -> list[Sample]:
    """The samples with their prompts as messages and the data's own answers.

    Args:
        prompts: the evaluation's prompts, of which the samples show the first.
        rows: the data; pairs have a chosen answer, unpaired rows a desirable one, prompts none.
    """
    if "label" in rows:
        rows = rows[rows["label"]].rename(columns={"completion": "chosen"})
    chosen = rows.drop_duplicates("prompt").set_index("prompt")["chosen"] if "chosen" in rows else {}
    return [
        sample.model_copy(update={"turns": turns_of(prompt), "chosen": _shown(chosen.get(prompt, ""))})
        for sample, prompt in zip(samples, prompts, strict=False)
    ]


def _shown(answer: str) -> str:
    """An answer of the data as text for people; the name of an image is none."""
    return "" if names_image(answer) else readable(answer)


def load_evaluation(manifest: Manifest) -> EvaluationDetails:
    """Read the measurements that the stage wrote."""
    return EvaluationDetails.model_validate_json((manifest.path / FILE).read_bytes())


def load_answers(manifest: Manifest) -> PolicyAnswers:
    """Read the answers that the stage wrote."""
    return PolicyAnswers.model_validate_json((manifest.path / ANSWERS_FILE).read_bytes())
