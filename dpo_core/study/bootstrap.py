"""Bootstraps a study: means in many resamples of its seeds and prompts, the same for all policies.

Seeds show how runs of a method differ, prompts how questions differ. Each resample draws both: prompts once
for the whole study, so that policies stay paired; seeds once for all settings with the same seeds. Of n seeds
n-1 are drawn: their mean then varies as much as the mean of n seeds, where n draws of few seeds would vary
too little (McCarthy & Snowden 1985). With one seed only prompts are resampled.

Legend: R resamples, the first of which is the data as measured; P prompts; S seeds of a setting.
"""

from collections.abc import Sequence

import numpy as np

from dpo_core.statistics.estimates import Estimate, Floats
from dpo_core.study.study_data import Point, Study

Setting = tuple[str, str]  # a policy and its setting


class Resampling:
    """Reward, KL and FLOPs of each setting in each resample."""

    def __init__(self, study: Study) -> None:
        rng = np.random.default_rng(study.seed)
        self.prompts = study.prompts
        # Points in order of their seed; policies, and settings within them, in order of their first point.
        self.points: dict[Setting, list[Point]] = {}
        for policy in study.policies():
            for point in study.points:
                if point.policy == policy:
                    self.points.setdefault((policy, point.setting), []).append(point)
        for points in self.points.values():
            points.sort(key=lambda point: point.seed)
        self._prompts_RP = weights(study.prompts, study.prompts, study.resamples, rng)
        self._seeds_RS: dict[tuple[int, ...], Floats] = {}
        self.reward_R: dict[Setting, Floats] = {}
        self.kl_R: dict[Setting, Floats] = {}
        self.kl_k3_R: dict[Setting, Floats] = {}
        self.flops_R: dict[Setting, Floats] = {}
        for setting, points in self.points.items():
            seeds = tuple(point.seed for point in points)
            if seeds not in self._seeds_RS:
                drawn = max(1, len(seeds) - 1)
                self._seeds_RS[seeds] = weights(len(seeds), drawn, study.resamples, rng)
            weights_RS = self._seeds_RS[seeds]
            self.reward_R[setting] = self._mean(weights_RS, [p.rewards_P for p in points])
            self.kl_R[setting] = self._mean(weights_RS, [p.kl_P for p in points])
            self.kl_k3_R[setting] = self._mean(weights_RS, [p.kl_k3_P for p in points])
            self.flops_R[setting] = weights_RS @ np.array([p.cost.flops for p in points])
        self.reference_R = self.over_prompts(study.reference_rewards_P)

    def over_prompts(self, values_P: Sequence[float]) -> Floats:
        """(R,): the mean of one number per prompt."""
        mean_R: Floats = self._prompts_RP @ np.asarray(values_P, dtype=np.float64)
        return mean_R

    def of_policy(self, values_R: dict[Setting, Floats], policy: str) -> Floats:
        """(R, K): one column for each of the policy's K settings."""
        return np.stack([values for (name, _), values in values_R.items() if name == policy], axis=1)

    def estimate(self, values_R: Floats, confidence: float = 0.95) -> Estimate:
        """The measured value with the percentile interval over the resamples."""
        tail = (1 - confidence) / 2
        low, high = np.quantile(values_R[1:], [tail, 1 - tail])
        return Estimate(value=float(values_R[0]), low=float(low), high=float(high), n=self.prompts)

    def estimate_where(self, values_R: Floats, defined_R: np.ndarray) -> tuple[Estimate | None, float]:
        """The estimate over the resamples where it is defined, and their share; None if not in the data."""
        share = float(defined_R[1:].mean())
        if not defined_R[0] or not share:
            return None, share
        return self.estimate(values_R[defined_R]), share

    def _mean(self, weights_RS: Floats, values_SP: Sequence[Sequence[float]]) -> Floats:
        by_seed_RS = self._prompts_RP @ np.asarray(values_SP, dtype=np.float64).T
        mean_R: Floats = (weights_RS * by_seed_RS).sum(axis=1)
        return mean_R


def weights(items: int, drawn: int, resamples: int, rng: np.random.Generator) -> Floats:
    """(R, items): the weight of each item, equal in the first row, `drawn` with replacement in the rest."""
    counts = rng.multinomial(drawn, np.full(items, 1 / items), resamples) / drawn
    return np.concatenate([np.full((1, items), 1 / items), counts])
