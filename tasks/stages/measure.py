"""The stage that measures one policy of a study on held-out prompts: rewards, KL, entropy, diversity."""

import json
from collections.abc import Mapping

import numpy as np

from dpo_core.config import Config
from dpo_core.statistics.text import distinct_n
from dpo_core.study import Point, PolicyCost
from tasks.recipe.study import PlannedPolicy
from tasks.stages.base import Context, Output, RunningStage, Stage, StageResult, run_stage, stage_task
from tasks.stages.evaluation import EvaluationSettings, read_samples, run_evaluation
from tasks.store.facts import Facts, facts_of
from tasks.store.manifest import Manifest

FILE, POLICY = "measurement.json", "policy"
MEASURE = Stage("measure", 2, "measurement", Facts, lambda run, label: run.evaluation_work(1), job="shared")


class Measurement(Config):
    """Measurements of a policy on P prompts with S samples each."""

    rewards_PS: list[list[float]]
    kl_P: list[float]
    """Nats, estimator k1, mean over a prompt's samples."""
    kl_k3_P: list[float]
    entropy: float
    """Nats per token, of the tokens that were sampled."""
    distinct_1: float
    distinct_2: float
    length: float
    """Mean tokens of a completion."""


@stage_task(MEASURE.name, f"{MEASURE.name}{{context.label}}")
def measure(
    context: Context,
    policy: Manifest,
    reference: Manifest,
    prompts: Manifest,
    settings: EvaluationSettings,
) -> StageResult:
    """Sample a policy on the held-out prompts, score it with the known reward, and estimate its KL."""

    def compute(running: RunningStage) -> Output:
        measured = _measured(running, policy, reference, prompts, settings)
        out = running.empty_folder("out")
        (out / FILE).write_text(json.dumps(measured.model_dump(mode="json"), allow_nan=False))
        metrics = {
            "reward": float(np.mean(measured.rewards_PS)),
            "kl": float(np.mean(measured.kl_P)),
            "kl_k3": float(np.mean(measured.kl_k3_P)),
            **measured.model_dump(include={"entropy", "distinct_1", "distinct_2", "length"}),
        }
        return Output(out, rows=len(measured.kl_P), metrics=metrics)

    inputs = {"policy": policy, "reference": reference, "prompts": prompts}
    return run_stage(context, MEASURE, inputs, settings.as_key(exclude={"pairs", "shown"}), compute)


def _measured(
    running: RunningStage,
    policy: Manifest,
    reference: Manifest,
    prompts: Manifest,
    settings: EvaluationSettings,
) -> Measurement:
    config = settings.config
    result = run_evaluation(
        running,
        prompts,
        settings,
        {
            "policies": {POLICY: str(policy.path)},
            "reference": str(reference.path),
            "reference_name": POLICY if policy.sha256 == reference.sha256 else None,
            "reward": str(settings.reward),
            "entropies": False,
        },
    )
    drawn = read_samples(result["policies"][POLICY]["samples"])

    def by_prompt(values: list[float]) -> np.ndarray:
        # The samples of a prompt are consecutive.
        return np.asarray(values, dtype=np.float64).reshape(len(result["prompts"]), config.samples_per_prompt)

    completions = [s.completion for s in drawn.sequences]
    length = config.sampling.max_new_tokens
    return Measurement(
        rewards_PS=by_prompt(drawn.rewards).tolist(),
        kl_P=by_prompt(drawn.kl_k1).mean(1).tolist(),
        kl_k3_P=by_prompt(drawn.kl_k3).mean(1).tolist(),
        entropy=float(str(drawn.entropy)),
        distinct_1=distinct_n(completions, 1, length=length),
        distinct_2=distinct_n(completions, 2, length=length),
        length=float(np.mean([len(c) for c in completions])),
    )


def read_measurement(manifest: Manifest) -> Measurement:
    """Read the measurement that the stage wrote."""
    return Measurement.model_validate_json((manifest.path / FILE).read_bytes())


def point_of(
    node: PlannedPolicy,
    trained: Manifest,
    measured: Manifest,
    needed: Mapping[str, Manifest],
    suites: Mapping[str, list[float]],
) -> Point:
    """A policy as a point of the study.

    Args:
        needed: artifacts made after the reference that its training needed, by name.
        suites: its main measure of each item of each suite.
    """
    measurement = read_measurement(measured)
    costs = [facts_of(manifest, Facts) for manifest in (trained, *needed.values())]
    memory = [cost.peak_memory_bytes for cost in costs if cost.peak_memory_bytes]
    cost = PolicyCost(
        flops=sum(cost.flops or 0.0 for cost in costs),
        seconds=sum(cost.seconds or 0.0 for cost in costs),
        peak_memory_bytes=max(memory, default=None),
    )
    return Point(
        policy=node.policy,
        setting=node.point or "",
        seed=node.seed,
        rewards_P=np.mean(measurement.rewards_PS, axis=1).tolist(),
        cost=cost,
        shared_cost={name: facts_of(m, Facts).flops or 0.0 for name, m in needed.items()},
        suites=dict(suites),
        **measurement.model_dump(exclude={"rewards_PS"}),
    )
