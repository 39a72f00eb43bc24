"""Studies of made-up policies whose truth is known."""

from typing import Any

import numpy as np

from dpo_core.study import Point, PolicyCost, Study

PROMPTS = 40


def point(
    policy: str, setting: str, seed: int, *, kl: float = 1.0, reward: float = 0.5, flops: float = 1e12,
    prompts: int = PROMPTS, **changes: Any,
) -> Point:  # fmt: skip
    """A policy with the same reward and KL on every prompt."""
    parts: dict[str, Any] = {
        "rewards_P": [reward] * prompts, "kl_P": [kl] * prompts, "kl_k3_P": [abs(kl)] * prompts,
        "entropy": 2.0, "distinct_1": 0.2, "distinct_2": 0.5, "length": 20.0,
        "cost": PolicyCost(flops=flops, seconds=60.0, peak_memory_bytes=2**30),
    }  # fmt: skip
    return Point(policy=policy, setting=setting, seed=seed, **(parts | changes))


def study(points: list[Point], **changes: Any) -> Study:
    """A study in which the reference has reward 0 on every prompt."""
    parts: dict[str, Any] = {
        "prompts": PROMPTS, "samples_per_prompt": 4, "reward_name": "made_up",
        "reference_rewards_P": [0.0] * PROMPTS, "reference_entropy": 2.5, "reference_distinct_2": 0.6,
        "points": points, "kl_at": [1.0, 4.0],
    }  # fmt: skip
    return Study(**(parts | changes))


def noisy(
    policies: dict[str, dict[str, tuple[float, float]]], *, seeds: int = 3, prompts: int = 64,
    data_seed: int = 0, seed_spread: float = 0.02,
    prompt_spread: float = 0.3, noise: float = 0.3, **changes: Any,
) -> Study:  # fmt: skip
    """A study drawn at random around the truth `{policy: {setting: (KL, reward)}}`.

    Prompts differ by `prompt_spread`, alike for all policies; seeds by `seed_spread`; the rest is `noise`.
    """
    rng = np.random.default_rng(data_seed)
    prompt_P = rng.normal(0, prompt_spread, prompts)
    points = []
    for policy, settings in policies.items():
        for setting, (kl, reward) in settings.items():
            for seed in range(seeds):
                rewards_P = reward + rng.normal(0, seed_spread) + prompt_P + rng.normal(0, noise, prompts)
                kl_P = kl + rng.normal(0, noise, prompts)
                points.append(
                    point(
                        policy, setting, seed, prompts=prompts, rewards_P=rewards_P.tolist(),
                        kl_P=kl_P.tolist(), kl_k3_P=np.abs(kl_P).tolist(),
                    )
                )  # fmt: skip
    reference_P = prompt_P + rng.normal(0, noise, prompts)
    parts = {"prompts": prompts, "reference_rewards_P": reference_P.tolist(), "resamples": 500}
    return study(points, **(parts | changes))
