"""The measurements of a study (`Study`, `Point`, `PolicyCost`): every policy on the same prompts.

Legend: P prompts, S samples of a prompt. A list whose name ends in `_P` holds one mean per prompt, over that
prompt's samples; all lists have the prompts in the same order.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from pydantic import Field

from dpo_core.config import Config


class PolicyCost(Config):
    """Cost of one policy after the SFT reference, over all stages of its pipeline.

    Sampling and labelling pairs, cached log-probs, the reward model, rollouts, training: a stage that several
    policies share counts in full for each.
    """

    flops: float = Field(ge=0)
    seconds: float = Field(ge=0)
    peak_memory_bytes: int | None = Field(None, ge=0)


class Point(Config):
    """A policy at one setting with one seed, measured on the study's prompts."""

    policy: str
    """Its name in the recipe: "DPO", "PPO-GT", "DPO, few", …"""
    setting: str
    """The values that vary within the policy, as `name=value`: "beta=0.1"."""
    seed: int
    rewards_P: list[float]
    kl_P: list[float]
    """Sequence KL to the reference in nats, estimator k1: unbiased, may be negative."""
    kl_k3_P: list[float]
    """The same distance, estimator k3: never negative."""
    entropy: float
    """Nats per token."""
    distinct_1: float
    distinct_2: float
    length: float
    """Mean tokens of a completion."""
    cost: PolicyCost
    shared_cost: dict[str, float] = Field(default_factory=dict)
    """FLOPs of the stages that other policies share, by stage; part of `cost`."""
    suites: dict[str, list[float]] = Field(default_factory=dict, exclude_if=lambda suites: not suites)
    """The values of each item of each suite, in the order of `Study.suites`."""


class BestOf(Config):
    """The best of n samples of the reference by the known reward: what search achieves without training."""

    n: int = Field(ge=1)
    rewards_P: list[float]
    kl_bound: float
    """log n - (n-1)/n nats, which its KL does not exceed (Beirami et al. 2024)."""


class Study(Config):
    """Policies trained from one reference at several settings and seeds, with their measurements."""

    prompts: int = Field(ge=2)
    samples_per_prompt: int = Field(ge=1)
    reward_name: str
    reward_is_true: bool = True
    """False: the reward is a learned proxy, which a policy can exploit."""
    reference_rewards_P: list[float]
    reference_entropy: float
    reference_distinct_2: float
    reference_distinct_1: float | None = None
    reference_length: float | None = None
    suites: dict[str, list[float]] = Field(default_factory=dict, exclude_if=lambda suites: not suites)
    """The reference's main measure of each item of each suite."""
    best_of: list[BestOf] = Field(default_factory=list)
    points: list[Point] = Field(default_factory=list)
    kl_at: list[float] = Field(default_factory=lambda: [2.0, 5.0, 10.0])
    """KLs in nats at which rewards are compared. Choose them before you see the results."""
    kl_max: float | None = Field(None, gt=0)
    """Upper limit of areas, the same for all policies. Empty: the largest of `kl_at`."""
    drawn: list[str] | None = None
    """Policies in the reward-KL figure. Empty: all. The others only serve claims."""
    resamples: int = Field(2000, ge=100)
    seed: int = 0
    """Seed of the resampling."""

    @property
    def kl_end(self) -> float:
        """Upper limit of areas, in nats."""
        return max(self.kl_at) if self.kl_max is None else self.kl_max

    def policies(self) -> list[str]:
        """The policies of the reward-KL figure in their order, then the others by their first point."""
        measured = dict.fromkeys(point.policy for point in self.points)
        return list(dict.fromkeys([*(self.drawn or ()), *measured]))

    def drawn_policies(self) -> list[str]:
        """The policies of the reward-KL figure, as the recipe lists them."""
        return self.policies() if self.drawn is None else self.drawn

    @property
    def base(self) -> str:
        """The first policy, the baseline for compute and diversity; empty if there is none."""
        return next(iter(self.policies()), "")


def best_of_n(rewards_PS: ArrayLike, ns: Sequence[int]) -> list[BestOf]:
    """The expected reward of the best of n samples, for each prompt, from its S samples (n is at most S).

    Unbiased: the mean of the maximum over all subsets of n, without replacement. The r-th smallest sample is
    the largest in C(r-1, n-1) of C(S, n) subsets.
    """
    sorted_PS = np.sort(np.asarray(rewards_PS, dtype=np.float64))
    samples = sorted_PS.shape[1]
    rows = []
    for n in ns:
        share_S = [math.comb(rank - 1, n - 1) / math.comb(samples, n) for rank in range(1, samples + 1)]
        kl_bound = math.log(n) - (n - 1) / n
        rows.append(BestOf(n=n, rewards_P=(sorted_PS @ share_S).tolist(), kl_bound=kl_bound))
    return rows
