"""Summarises a study: settings, envelopes, compute and diversity, each with its uncertainty.

A policy's envelope passes through the means over seeds of its settings, never through single runs: the best
of many noisy runs is biased upwards. A policy with more settings still has an advantage; compare policies
with about as many.
"""

import re
from collections.abc import Sequence
from itertools import combinations

import numpy as np

from dpo_core.statistics.estimates import Estimate, Floats
from dpo_core.study.bootstrap import Resampling, Setting
from dpo_core.study.envelopes import XY, areas, envelope, rewards_at
from dpo_core.study.results import (
    AtKl,
    BestOfRow,
    ComputeRatio,
    DiversityDifference,
    GainRatio,
    PolicyDifference,
    PolicySummary,
    SeedRange,
    SettingRow,
    StudySummary,
)
from dpo_core.study.study_data import BestOf, PolicyCost, Study
from dpo_core.study.suites import suite_rows

GAIN_SHARES = (0.5, 0.9)
FEW = ("Pre-DPO, few", "DPO, few")  # the policies of a published claim
DIVERSITY = ("entropy", "distinct_1", "distinct_2")


def summarise(study: Study) -> StudySummary:
    """Everything that the tables and figures of the study show. The same study gives the same numbers."""
    resampling = Resampling(study)
    policies = study.policies()
    base = study.base
    others = [policy for policy in policies if policy != base]
    suites, suite_differences = suite_rows(study, resampling)
    return StudySummary(
        prompts=study.prompts,
        seeds=sorted({point.seed for point in study.points}),
        resamples=study.resamples,
        kl_end=study.kl_end,
        kl_at=study.kl_at,
        reference=resampling.estimate(resampling.reference_R),
        settings=[_setting_row(resampling, setting) for setting in resampling.points],
        policies=[_policy_row(study, resampling, policy) for policy in policies],
        differences=[_difference(study, resampling, *pair) for pair in combinations(policies, 2)],
        compute=[
            _compute_ratio(resampling, base, policy, share) for policy in others for share in GAIN_SHARES
        ],
        diversity=[row for policy in others for row in _diversity(resampling, policy, base)],
        gains=[_gain_ratio(resampling, *FEW)] if _matched(resampling, *FEW) else [],
        best_of=[_best_of_row(resampling, best) for best in study.best_of],
        suites=suites,
        suite_differences=suite_differences,
    )


def _setting_row(resampling: Resampling, setting: Setting) -> SettingRow:
    points = resampling.points[setting]
    memory = [p.cost.peak_memory_bytes for p in points if p.cost.peak_memory_bytes is not None]
    stages = dict.fromkeys(stage for point in points for stage in point.shared_cost)
    return SettingRow(
        policy=setting[0],
        setting=setting[1],
        seeds=[point.seed for point in points],
        reward=resampling.estimate(resampling.reward_R[setting]),
        gain=resampling.estimate(resampling.reward_R[setting] - resampling.reference_R),
        seed_rewards=_seed_range([float(np.mean(point.rewards_P)) for point in points]),
        kl=resampling.estimate(resampling.kl_R[setting]),
        kl_k3=resampling.estimate(resampling.kl_k3_R[setting]),
        entropy=float(np.mean([point.entropy for point in points])),
        distinct_1=float(np.mean([point.distinct_1 for point in points])),
        distinct_2=float(np.mean([point.distinct_2 for point in points])),
        length=float(np.mean([point.length for point in points])),
        cost=PolicyCost(
            flops=float(np.mean([point.cost.flops for point in points])),
            seconds=float(np.mean([point.cost.seconds for point in points])),
            peak_memory_bytes=max(memory, default=None),
        ),
        shared_cost={
            stage: float(np.mean([point.shared_cost.get(stage, 0.0) for point in points])) for stage in stages
        },
    )


def _seed_range(values: Sequence[float]) -> SeedRange:
    return SeedRange(value=float(np.mean(values)), low=min(values), high=max(values), seeds=len(values))


def _policy_row(study: Study, resampling: Resampling, policy: str) -> PolicySummary:
    kl_RK, reward_RK = (
        resampling.of_policy(resampling.kl_R, policy),
        resampling.of_policy(resampling.reward_R, policy),
    )
    reach = max(0.0, float(kl_RK[0].max()))
    flops_K = resampling.of_policy(resampling.flops_R, policy)[0]
    groups = [points for (name, _), points in resampling.points.items() if name == policy]
    return PolicySummary(
        policy=policy,
        settings=len(groups),
        seeds=sorted({point.seed for points in groups for point in points}),
        fewest_seeds=min(map(len, groups)),
        area=resampling.estimate(areas(kl_RK, reward_RK, resampling.reference_R, study.kl_end)),
        reach=reach,
        at_kl=[
            AtKl(
                kl=kl,
                reward=resampling.estimate(rewards_at(kl_RK, reward_RK, resampling.reference_R, kl)),
                reached=kl <= reach,
            )
            for kl in study.kl_at
        ],
        envelope=envelope(_pairs(kl_RK[0], reward_RK[0]), float(resampling.reference_R[0])),
        staircase=_staircase(_pairs(flops_K, reward_RK[0])),
    )


def _pairs(x_K: Floats, y_K: Floats) -> list[XY]:
    return [(float(x), float(y)) for x, y in zip(x_K, y_K, strict=True)]


def _staircase(points: Sequence[XY]) -> list[XY]:
    steps: list[XY] = []
    for flops, reward in sorted(points, key=lambda point: (point[0], -point[1])):
        if not steps or reward > steps[-1][1]:
            steps.append((flops, reward))
    return steps


def _difference(study: Study, resampling: Resampling, policy: str, other: str) -> PolicyDifference:
    sides = [
        (resampling.of_policy(resampling.kl_R, name), resampling.of_policy(resampling.reward_R, name))
        for name in (policy, other)
    ]
    reach = max(0.0, min(float(kl_RK[0].max()) for kl_RK, _ in sides))
    common_kl = min(study.kl_end, reach)

    def area_to(kl: float) -> Estimate:
        ours_R, theirs_R = (areas(*side, resampling.reference_R, kl) for side in sides)
        return resampling.estimate(ours_R - theirs_R)

    def reward_at(kl: float) -> Estimate:
        ours_R, theirs_R = (rewards_at(*side, resampling.reference_R, kl) for side in sides)
        return resampling.estimate(ours_R - theirs_R, confidence=1 - 0.05 / len(study.kl_at))

    return PolicyDifference(
        policy=policy,
        other=other,
        area=area_to(study.kl_end),
        common_kl=common_kl,
        common_area=area_to(common_kl) if common_kl > 0 else None,
        at_kl=[AtKl(kl=kl, reward=reward_at(kl), reached=kl <= reach) for kl in study.kl_at],
    )


def _compute_ratio(resampling: Resampling, policy: str, other: str, share: float) -> ComputeRatio:
    rewards = [resampling.of_policy(resampling.reward_R, name) for name in (policy, other)]
    common_R = np.minimum(*(reward_RK.max(axis=1) for reward_RK in rewards)) - resampling.reference_R
    target_R = resampling.reference_R + share * common_R
    flops_R, other_R = (
        _cheapest(resampling.of_policy(resampling.flops_R, name), reward_RK, target_R)
        for name, reward_RK in zip((policy, other), rewards, strict=True)
    )
    defined_R = (common_R > 0) & (other_R > 0)
    ratio_R = np.divide(flops_R, other_R, out=np.zeros_like(flops_R), where=defined_R)
    ratio, defined = resampling.estimate_where(ratio_R, defined_R)
    return ComputeRatio(
        policy=policy,
        other=other,
        gain_share=share,
        reward=float(target_R[0]) if ratio else None,
        flops=float(flops_R[0]) if ratio else None,
        other_flops=float(other_R[0]) if ratio else None,
        ratio=ratio,
        defined=defined,
    )


def _cheapest(flops_RK: Floats, reward_RK: Floats, target_R: Floats) -> Floats:
    least_R: Floats = np.where(reward_RK >= target_R[:, None], flops_RK, np.inf).min(axis=1)
    return least_R


def _matched(resampling: Resampling, policy: str, other: str) -> list[tuple[Setting, Setting]]:
    """Pairs of settings of two policies: the same setting, or else the only one with the same beta."""
    matched = []
    theirs = [setting for setting in resampling.points if setting[0] == other]
    for ours in resampling.points:
        if ours[0] != policy:
            continue
        same = [setting for setting in theirs if setting[1] == ours[1]]
        beta = _beta(ours[1])
        near = [setting for setting in theirs if beta is not None and _beta(setting[1]) == beta]
        matched += [(ours, setting) for setting in same or near if len(same or near) == 1]
    return matched


def _beta(setting: str) -> float | None:
    match = re.search(r"\bbeta=([0-9.]+(?:e[+-]?\d+)?)", setting)
    return float(match[1]) if match else None


def _diversity(resampling: Resampling, policy: str, other: str) -> list[DiversityDifference]:
    rows = []
    for ours, theirs in _matched(resampling, policy, other):
        by_seed = {point.seed: point for point in resampling.points[theirs]}
        both = [(p, by_seed[p.seed]) for p in resampling.points[ours] if p.seed in by_seed]
        for metric in DIVERSITY:
            values = [(getattr(a, metric), getattr(b, metric)) for a, b in both]
            if values and all(base > 0 for _, base in values):
                relative = _seed_range([value / base - 1 for value, base in values])
                rows.append(
                    DiversityDifference(
                        policy=policy, other=other, setting=ours[1], metric=metric, relative=relative
                    )
                )
    return rows


def _gain_ratio(resampling: Resampling, policy: str, other: str) -> GainRatio:
    matched = _matched(resampling, policy, other)
    gain_R, other_R = (
        np.mean([resampling.reward_R[pair[side]] for pair in matched], axis=0) - resampling.reference_R
        for side in (0, 1)
    )
    defined_R = other_R > 0
    ratio_R = np.divide(gain_R, other_R, out=np.ones_like(gain_R), where=defined_R)
    relative, defined = resampling.estimate_where(ratio_R - 1, defined_R)
    return GainRatio(
        policy=policy,
        other=other,
        settings=[ours[1] for ours, _ in matched],
        fewest_seeds=min(len(resampling.points[setting]) for pair in matched for setting in pair),
        gain=resampling.estimate(gain_R),
        other_gain=resampling.estimate(other_R),
        relative=relative,
        defined=defined,
    )


def _best_of_row(resampling: Resampling, best: BestOf) -> BestOfRow:
    reward_R = resampling.over_prompts(best.rewards_P)
    return BestOfRow(
        n=best.n,
        kl_bound=best.kl_bound,
        reward=resampling.estimate(reward_R),
        gain=resampling.estimate(reward_R - resampling.reference_R),
    )
