"""Bootstrap over prompts: the resampling behind the intervals of `estimates` and the tests of `significance`.

Plain percentiles of a bootstrap are too narrow for few prompts: the resamples have the variance with divisor
n, and normal tails ignore that it was estimated. The expanded percentile interval (Hesterberg 2015, "What
Teachers Should Know About the Bootstrap", The American Statistician 69(4), section 3.3) corrects both: for
tails of α/2 it uses the quantiles at Φ(-√(n/(n-1))·t_{n-1, 1-α/2}), the normal tail beyond Student's t. For
30 prompts that is 1.9 % instead of 2.5 %; for 1,000 prompts 2.49 %.
"""

import math
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special  # type: ignore[import-untyped]

from dpo_core.errors import StageFailed

# Indices drawn at a time, which limits the memory of a bootstrap over many prompts to some tens of MB.
_DRAWS_PER_BLOCK = 2_000_000

Floats = NDArray[np.float64]


def finite(values: ArrayLike, name: str = "value") -> Floats:
    """The values as (N,) float64.

    Args:
        name: what the error calls one of them.

    Raises:
        StageFailed: a value is not finite.
        ValueError: the array is not one-dimensional.
    """
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1:
        raise ValueError(f"expected one number per item, got shape {x.shape}")
    bad = np.flatnonzero(~np.isfinite(x))
    if len(bad):
        raise StageFailed(
            f"{name} {bad[0]} of {len(x)} is {x[bad[0]]} ({len(bad)} in total are not finite)",
            "Check the weights of the measured model, and the reward, then evaluate again; leaving values "
            "out would bias the result",
        )
    return x


def paired_difference(a: ArrayLike, b: ArrayLike) -> Floats:
    """a - b, item by item."""
    x, y = finite(a), finite(b)
    if x.shape != y.shape:
        raise ValueError(f"paired values have {len(x)} and {len(y)} items")
    return x - y


def cluster_codes(clusters: Sequence[Hashable] | None, items: int) -> NDArray[np.intp]:
    """(N,): index of each item's cluster, in order of first appearance. None: each item is a cluster."""
    if clusters is None:
        return np.arange(items)
    if len(clusters) != items:
        raise ValueError(f"{len(clusters)} cluster names for {items} values")
    index: dict[Hashable, int] = {}
    return np.fromiter((index.setdefault(name, len(index)) for name in clusters), dtype=np.intp, count=items)


def cluster_sums(x: Floats, clusters: Sequence[Hashable] | None) -> tuple[Floats, Floats]:
    """Sum and count of the values of each cluster, in order of first appearance."""
    codes = cluster_codes(clusters, len(x))
    return np.bincount(codes, weights=x).astype(np.float64), np.bincount(codes).astype(np.float64)


def require_two(prompts: int) -> None:
    """Raise StageFailed for fewer than two prompts: they have no interval."""
    if prompts < 2:
        raise StageFailed(
            f"a bootstrap interval needs at least 2 prompts, not {prompts}", "Evaluate on more prompts."
        )


def resampled_means(sums: Floats, sizes: Floats, n_resamples: int, seed: int) -> Floats:
    """(R,): the mean of all values in each resample of the clusters. Equal seed and sizes give equal
    draws."""
    generator = np.random.default_rng(seed)
    n = len(sums)
    equal = bool((sizes == sizes[0]).all())
    block = max(1, _DRAWS_PER_BLOCK // n)
    means = np.empty(n_resamples)
    for start in range(0, n_resamples, block):
        stop = min(start + block, n_resamples)
        drawn = generator.integers(0, n, size=(stop - start, n), dtype=np.int32)
        totals = sums[drawn].sum(axis=1)
        means[start:stop] = totals / (n * sizes[0] if equal else sizes[drawn].sum(axis=1))
    return means


def expanded_interval(resampled: Floats, prompts: int, confidence: float) -> tuple[float, float]:
    """The expanded percentile interval of a statistic's resampled values."""
    tail = float(special.ndtr(-student_quantile(confidence, prompts) * math.sqrt(prompts / (prompts - 1))))
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return float(low), float(high)


def expanded_p(resampled: Floats, prompts: int) -> float:
    """Two-sided p-value of zero: the level at which the expanded interval ends at zero.

    The tail is the smaller share of resamples on one side of zero. Zeros count for both sides, and the data
    count as one more resample (Davison & Hinkley 1997, section 4.2), so that p is never 0. The p-value
    follows from the Student's t that the interval would use for that tail.
    """
    # Sums of the same differences in another order may differ from zero by rounding.
    zero = np.abs(resampled) <= 1e-12 * np.abs(resampled).max(initial=0.0)
    below, above = int(((resampled < 0) | zero).sum()), int(((resampled > 0) | zero).sum())
    tail = (min(below, above) + 1) / (len(resampled) + 1)
    if tail >= 0.5:
        return 1.0
    t = special.ndtri(tail) * math.sqrt((prompts - 1) / prompts)
    return 2 * float(special.stdtr(prompts - 1, t))


def student_quantile(confidence: float, prompts: int) -> float:
    """The two-sided quantile of Student's t with n-1 degrees of freedom at this confidence."""
    return float(special.stdtrit(prompts - 1, (1 + confidence) / 2))
