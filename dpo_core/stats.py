"""Estimates with their uncertainty. The unit of resampling is the prompt, never a token or one judgement.

Two numbers measured on the same prompts are compared by `paired_bootstrap`, not by looking at two intervals.
"""

import math
from collections.abc import Hashable, Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict

from dpo_core.errors import StageFailed

# Indices drawn at a time: bounds the memory of a bootstrap over many prompts to some tens of MB.
_DRAWS_PER_BLOCK = 2_000_000

Floats = NDArray[np.float64]


class Estimate(BaseModel):
    """A number with its confidence interval."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    value: float
    low: float
    high: float
    n: int
    """How many independent units (prompts) it rests on."""

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}] (n={self.n})"


def wilson(successes: float, n: int, confidence: float = 0.95) -> Estimate:
    """A share with the Wilson score interval (Wilson 1927), which stays honest at 0 and at n successes.

    Raises:
        StageFailed: n is 0.
        ValueError: `successes` is not in [0, n].
    """
    if n < 1:
        raise StageFailed("a share of 0 prompts has no value", "Evaluate on at least one prompt.")
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    p = successes / n
    center = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # Exactly 0 and 1 at the ends, where rounding would leave 1e-17.
    low = 0.0 if successes == 0 else (center - half) / scale
    high = 1.0 if successes == n else (center + half) / scale
    return Estimate(value=p, low=low, high=high, n=n)


def bootstrap_mean(
    values: ArrayLike,
    clusters: Sequence[Hashable] | None = None,
    *,
    n_resamples: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Estimate:
    """Mean of all values with a percentile bootstrap interval.

    Args:
        values: (N,) finite numbers.
        clusters: the prompt of each value; whole prompts are resampled. None: every value is its own.
            A prompt with more values weighs more, as it does in the plain mean.
        seed: same seed and data, same interval.

    Raises:
        StageFailed: fewer than two clusters (an interval would be a fiction), or a value is not finite.
        ValueError: `clusters` has another length.
    """
    x = _finite(values)
    sums, sizes = _cluster_sums(x, clusters)
    if len(sums) < 2:
        raise StageFailed(
            f"a bootstrap interval needs at least 2 prompts, not {len(sums)}", "Evaluate on more prompts."
        )
    means = _resampled_means(sums, sizes, n_resamples, np.random.default_rng(seed))
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Estimate(value=float(x.mean()), low=float(low), high=float(high), n=len(sums))


def paired_bootstrap(
    a: ArrayLike,
    b: ArrayLike,
    clusters: Sequence[Hashable] | None = None,
    *,
    n_resamples: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Estimate:
    """Mean of a - b, measured on the same items, with a percentile bootstrap interval over prompts.

    `low > 0` says that a is larger than b at this confidence. Arguments and errors: `bootstrap_mean`.
    """
    differences = _paired_difference(a, b)
    return bootstrap_mean(differences, clusters, n_resamples=n_resamples, seed=seed, confidence=confidence)


def win_rate(
    a: ArrayLike,
    b: ArrayLike,
    clusters: Sequence[Hashable] | None = None,
    *,
    n_resamples: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Estimate:
    """Share of items in which a's score beats b's, a tie counting one half. Interval and errors: `share`."""
    scores = (np.sign(_paired_difference(a, b)) + 1) / 2
    return share(scores, clusters, n_resamples=n_resamples, seed=seed, confidence=confidence)


def share(
    values: ArrayLike,
    clusters: Sequence[Hashable] | None = None,
    *,
    n_resamples: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Estimate:
    """Mean of values in [0, 1] (right or wrong, a win or half of one), with an interval that stays in it.

    The interval is Wilson's where every value is its own prompt and either 0 or 1, else a bootstrap over
    prompts. Where all prompts have the same share (all right, all tied) a bootstrap would claim certainty;
    Wilson on the number of prompts stands in. Arguments and errors: `bootstrap_mean`.
    """
    x = _finite(values)
    sums, sizes = _cluster_sums(x, clusters)
    plain = len(sums) == len(x) and bool(np.isin(x, (0.0, 1.0)).all())
    if len(sums) and (plain or np.ptp(sums / sizes) == 0):
        return wilson(float(x.mean()) * len(sums), len(sums), confidence)
    return bootstrap_mean(x, clusters, n_resamples=n_resamples, seed=seed, confidence=confidence)


def _finite(values: ArrayLike) -> Floats:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1:
        raise ValueError(f"expected one number per item, got shape {x.shape}")
    bad = np.flatnonzero(~np.isfinite(x))
    if len(bad):
        raise StageFailed(
            f"value {bad[0]} of {len(x)} is {x[bad[0]]} ({len(bad)} in all are not finite)",
            "Find out why the evaluation produced it; dropping it would bias the result.",
        )
    return x


def _paired_difference(a: ArrayLike, b: ArrayLike) -> Floats:
    x, y = _finite(a), _finite(b)
    if x.shape != y.shape:
        raise ValueError(f"paired values have {len(x)} and {len(y)} items")
    return x - y


def _cluster_sums(x: Floats, clusters: Sequence[Hashable] | None) -> tuple[Floats, Floats]:
    """Sum and number of the values of each cluster, in order of first appearance."""
    if clusters is None:
        return x, np.ones_like(x)
    if len(clusters) != len(x):
        raise ValueError(f"{len(clusters)} cluster names for {len(x)} values")
    index: dict[Hashable, int] = {}
    codes = np.fromiter(
        (index.setdefault(name, len(index)) for name in clusters), dtype=np.intp, count=len(x)
    )
    sums = np.bincount(codes, weights=x).astype(np.float64)
    return sums, np.bincount(codes).astype(np.float64)


def _resampled_means(sums: Floats, sizes: Floats, n_resamples: int, generator: np.random.Generator) -> Floats:
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
