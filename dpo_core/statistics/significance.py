"""Significance tests for two models on the same items: McNemar's, a bootstrap test, Holm's correction."""

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy import special  # type: ignore[import-untyped]

from dpo_core.statistics.bootstrap import (
    cluster_sums,
    expanded_p,
    finite,
    paired_difference,
    require_two,
    resampled_means,
)


def mcnemar(a: ArrayLike, b: ArrayLike) -> float:
    """Two-sided p-value of McNemar's test that a and b are right equally often.

    The exact variant (McNemar 1947): among the items on which the two disagree, the number that only a has
    right is binomial with probability one half; p is twice the smaller tail, at most 1. It is 1 if they never
    disagree.

    Args:
        a, b: (N,) values 0 or 1; each item is a prompt of its own.

    Raises:
        ValueError: a value is neither 0 nor 1, or the lengths differ.
    """
    difference = paired_difference(a, b)
    if not np.isin(np.concatenate([finite(a), finite(b)]), (0.0, 1.0)).all():
        raise ValueError("McNemar's test needs values that are 0 or 1")
    wins, losses = int((difference > 0).sum()), int((difference < 0).sum())
    if not wins + losses:
        return 1.0
    return min(1.0, 2 * float(special.bdtr(min(wins, losses), wins + losses, 0.5)))


def bootstrap_p(
    a: ArrayLike,
    b: ArrayLike,
    clusters: Sequence[Hashable] | None = None,
    *,
    n_resamples: int = 10_000,
    seed: int = 0,
) -> float:
    """Two-sided p-value of no mean difference of a and b, resampled by prompt.

    It inverts the interval of `estimates.paired_bootstrap` on the same draws: if p is below 5 %, the 95 %
    interval excludes zero. Its smallest value is about 2/(n_resamples + 1). Arguments and errors:
    `estimates.paired_bootstrap`.
    """
    sums, sizes = cluster_sums(paired_difference(a, b), clusters)
    require_two(len(sums))
    return expanded_p(resampled_means(sums, sizes, n_resamples, seed), len(sums))


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values corrected for multiple testing (Holm 1979), in the same order.

    Rejecting all with corrected p at most α has a family-wise error of at most α, whatever their dependence.
    The smallest of m is multiplied by m, the next by m-1, and so on; values never decrease and are at most 1.
    """
    p = np.asarray(p_values, np.float64)
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError("a p-value is outside [0, 1]")
    order = np.argsort(p, kind="stable")
    corrected = np.empty_like(p)
    corrected[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    return [float(p_value) for p_value in np.minimum(corrected, 1.0)]
