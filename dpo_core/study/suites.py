"""Scores of a study's policies on suites: each policy at one setting, chosen by its reward on other prompts.

The setting is the one with the largest mean reward on the study's held-out prompts, which the suites do not
contain: chosen on the suites themselves, the best of many settings would be flattered. Intervals resample
the items of a suite and the seeds of a setting, as `bootstrap` does.
"""

from itertools import permutations

import numpy as np

from dpo_core.statistics.estimates import Estimate, Floats
from dpo_core.study.bootstrap import Resampling, weights
from dpo_core.study.results import SeedRange, SuiteDifference, SuiteRow
from dpo_core.study.study_data import Point, Study


def suite_rows(study: Study, resampling: Resampling) -> tuple[list[SuiteRow], list[SuiteDifference]]:
    """The score of each policy on each suite, and the differences of each two policies."""
    chosen = {policy: _best(resampling, policy) for policy in study.policies()}
    rows: list[SuiteRow] = []
    differences: list[SuiteDifference] = []
    for suite, reference_I in study.suites.items():
        rng = np.random.default_rng(study.seed)
        items_RI = weights(len(reference_I), len(reference_I), study.resamples, rng)
        seeds: dict[int, Floats] = {}
        scores: dict[str, Floats] = {}
        base_R = items_RI @ np.asarray(reference_I)
        for policy, (setting, points) in chosen.items():
            count = len(points)
            seeds.setdefault(count, weights(count, max(1, count - 1), study.resamples, rng))
            values_SI = np.asarray([point.suites[suite] for point in points])
            scores[policy] = (seeds[count] * (items_RI @ values_SI.T)).sum(1)
            by_seed = (values_SI.mean(1) - np.mean(reference_I)).tolist()
            rows.append(
                SuiteRow(
                    suite=suite,
                    policy=policy,
                    setting=setting,
                    score=_estimate(scores[policy], len(reference_I)),
                    gain=_estimate(scores[policy] - base_R, len(reference_I)),
                    seed_gains=SeedRange(
                        value=float(np.mean(by_seed)), low=min(by_seed), high=max(by_seed), seeds=count
                    ),
                )
            )
        for policy, other in permutations(scores, 2):
            ours_R, theirs_R = scores[policy], scores[other]
            defined = bool((theirs_R > 0).all())
            differences.append(
                SuiteDifference(
                    suite=suite,
                    policy=policy,
                    other=other,
                    difference=_estimate(ours_R - theirs_R, len(reference_I)),
                    relative=_estimate(ours_R / theirs_R - 1, len(reference_I)) if defined else None,
                    fewest_seeds=min(len(chosen[name][1]) for name in (policy, other)),
                )
            )
    return rows, differences


def _best(resampling: Resampling, policy: str) -> tuple[str, list[Point]]:
    settings = {name: points for (owner, name), points in resampling.points.items() if owner == policy}
    best = max(settings, key=lambda name: float(resampling.reward_R[policy, name][0]))
    return best, settings[best]


def _estimate(values_R: Floats, items: int) -> Estimate:
    low, high = np.quantile(values_R[1:], [0.025, 0.975])
    return Estimate(value=float(values_R[0]), low=float(low), high=float(high), n=items)
