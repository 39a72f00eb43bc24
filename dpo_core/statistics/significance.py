"""Whether two models differ on the same items: McNemar's test, a bootstrap test, and Holm's correction."""

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from dpo_core.statistics.bootstrap import (
    cluster_sums,
    expanded_p,
    finite,
    need_two,
    paired_difference,
    resampled_means,
    special,
)


def mcnemar(a: ArrayLike, b: ArrayLike) -> float:
    """Two-sided p-value of McNemar's test that a and b are right equally often.

    The exact variant, for any number of pairs: of the items on which the two disagree, those that a alone
    has right follow a binomial of one half; twice the smaller tail, at most 1 (McNemar 1947). 1 where they
    never disagree.

    Args:
        a, b: (N,) 0 or 1, each item a prompt of its own.

    Raises:
        ValueError: a value is neither 0 nor 1, or the lengths differ.
    """
    difference = paired_difference(a, b)
    if not np.isin(np.concatenate([finite(a), finite(b)]), (0.0, 1.0)).all():
        raise ValueError("McNemar's test is of values that are 0 or 1")
    wins, losses = int((difference > 0).sum()), int((difference < 0).sum())
    return (
        min(1.0, 2 * float(special().bdtr(min(wins, losses), wins + losses, 0.5))) if wins + losses else 1.0
    )


def bootstrap_p(
    a: ArrayLike,
    b: ArrayLike,
    clusters: Sequence[Hashable] | None = None,
    *,
    n_resamples: int = 10_000,
    seed: int = 0,
) -> float:
    """Two-sided p-value of no mean difference of a and b, resampled by prompt.

    It inverts the interval of `estimates.paired_bootstrap` on the same draws: where p is below 5 %, the 95 %
    interval leaves zero out. Never below what the resamples can tell, 2/(n_resamples + 1) or somewhat more.
    Arguments and errors: `estimates.paired_bootstrap`.
    """
    sums, sizes = cluster_sums(paired_difference(a, b), clusters)
    need_two(len(sums))
    return expanded_p(resampled_means(sums, sizes, n_resamples, seed), len(sums))


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values corrected for all of them together (Holm 1979), in the order given.

    Those at most α hold together with a family-wise error of α, whatever their dependence: the smallest of m
    is multiplied by m, the next by m-1, and so on, none below the one before nor above 1.
    """
    p = np.asarray(p_values, np.float64)
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError("a p-value lies outside [0, 1]")
    order = np.argsort(p, kind="stable")
    corrected = np.empty_like(p)
    corrected[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    return [float(one) for one in np.minimum(corrected, 1.0)]
