"""Frontier reports of synthetic numbers of a realistic size; nothing here was measured."""

from typing import Any

import numpy as np

from dpo_core.study import Point, PolicyCost, Study, best_of_n
from tasks.reports.study_report import StudyReport, study_report
from tests.support.reports.run_reports import HOSTILE, example

PROMPTS, SEEDS = 48, 3
# Policy -> (how fast its reward saturates with KL, FLOPs)
ARMS = {
    "DPO": (2.0, 2.1e15), "PPO": (2.8, 8.4e15), "GRPO": (2.5, 7.7e15), "PPO-GT": (2.2, 7.9e15),
    "TDPO1": (2.3, 2.9e15), "TDPO2": (2.2, 2.9e15), "f-DPO": (2.6, 2.1e15),
}  # fmt: skip


def make_study(
    policies: dict[str, tuple[float, float]] = ARMS, *, seeds: int = SEEDS, **changes: Any
) -> Study:
    """A study like those of the flow: four settings a policy, few-sample policies that only serve a claim."""
    rng = np.random.default_rng(0)
    prompt_P = rng.normal(0, 0.2, PROMPTS)
    points = []
    for policy, (scale, flops) in policies.items():
        for beta, kl in ((0.05, 7.5), (0.1, 4.2), (0.5, 1.6), (1.0, 0.6)):
            reward = 0.1 + 0.8 * (1 - np.exp(-kl / scale))
            for seed in range(seeds):
                points.append(_point(rng, prompt_P, policy, f"beta={beta}", seed, float(reward), kl, flops))
    for policy, reward in (("DPO, few", 0.35), ("Pre-DPO, few", 0.4)) if policies else ():
        points += [
            _point(rng, prompt_P, policy, "beta=0.1", seed, reward, 1.5, 3e14) for seed in range(seeds)
        ]
    samples_PS = 0.1 + prompt_P[:, None] + rng.normal(0, 0.3, (PROMPTS, 16))
    parts: dict[str, Any] = {
        "prompts": PROMPTS, "samples_per_prompt": 16, "reward_name": "vader_compound",
        "reference_rewards_P": samples_PS.mean(axis=1).tolist(), "reference_entropy": 2.9,
        "reference_distinct_2": 0.61, "reference_length": 43.0, "best_of": best_of_n(samples_PS, [2, 4, 16]),
        "points": points, "kl_at": [2.0, 5.0], "kl_max": 7.0, "resamples": 400, "drawn": list(policies),
    }  # fmt: skip
    return Study(**(parts | changes))


def _point(
    rng: np.random.Generator, prompt_P: np.ndarray, policy: str, setting: str, seed: int, reward: float,
    kl: float, flops: float,
) -> Point:  # fmt: skip
    kl_P = kl + rng.normal(0, 0.8, PROMPTS)
    rewards_P = reward + prompt_P + rng.normal(0, 0.2, PROMPTS) + rng.normal(0, 0.02)
    token_level = 0.3 if policy.startswith("TDPO") else 0.0
    return Point(
        policy=policy, setting=setting, seed=seed, rewards_P=rewards_P.tolist(), kl_P=kl_P.tolist(),
        kl_k3_P=np.abs(kl_P).tolist(), entropy=2.8 - 0.15 * kl + token_level + 0.01 * seed,
        distinct_1=0.3 - 0.01 * kl, distinct_2=0.6 - 0.03 * kl, length=44.0 + kl,
        cost=PolicyCost(flops=flops * (1 + 0.02 * seed), seconds=flops / 1e13, peak_memory_bytes=6 * 2**30),
        shared_cost={"sample_pairs": 3e14},
    )  # fmt: skip


RUN = example(steps=2)


def make_report(study: Study) -> StudyReport:
    return study_report(study, RUN.run, RUN.stages, RUN.cost, {"seed": 7})


def hostile_report() -> StudyReport:
    """Markup wherever text comes from a recipe or a person."""
    study = make_study({HOSTILE: (2.0, 1e15), "DPO": (2.0, 1e15)}, reward_name=HOSTILE)
    points = [p.model_copy(update={"setting": HOSTILE, "shared_cost": {HOSTILE: 1e12}}) if i < 3 else p
              for i, p in enumerate(study.points)]  # fmt: skip
    run = RUN.run.model_copy(update={"name": HOSTILE, "recipe": HOSTILE, "hardware": HOSTILE})
    stages = [RUN.stages[0].model_copy(update={"name": HOSTILE})]
    return study_report(study.model_copy(update={"points": points}), run, stages, None, {HOSTILE: HOSTILE})
