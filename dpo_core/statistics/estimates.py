"""Estimates with confidence intervals. The unit of resampling is the prompt, never a token or a judgement.

Compare two numbers measured on the same prompts by `paired_bootstrap` (means) or `share_difference` (shares),
not by looking at two intervals; `significance` has the tests.

In 1,000 simulated evaluations of 30, 60 and 200 prompts (`test_coverage.py`) the 95 % intervals cover the
true value in 93 to 97 % of the cases. Coverage is lower if few values dominate the mean: 87 % for 30 prompts
with log-normal values (σ = 1), where no interval from the data alone does much better.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from pydantic import BaseModel, ConfigDict

from dpo_core.errors import StageFailed
from dpo_core.statistics.bootstrap import (
    Floats,
    cluster_codes,
    cluster_sums,
    expanded_interval,
    finite,
    paired_difference,
    require_two,
    resampled_means,
    student_quantile,
)

__all__ = [
    "Estimate",
    "Floats",
    "bootstrap_mean",
    "bootstrap_statistic",
    "paired_bootstrap",
    "share",
    "share_difference",
    "wilson",
    "win_rate",
]

# Largest share of resamples in which a statistic may be undefined: more would remove a tail of its interval.
_UNDEFINED = 0.01


class Estimate(BaseModel):
    """A number with its confidence interval."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    value: float
    low: float
    high: float
    n: int
    """Number of independent units (prompts)."""

    def __neg__(self) -> "Estimate":
        return Estimate(value=-self.value, low=-self.high, high=-self.low, n=self.n)

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}] (n={self.n})"


def wilson(successes: float, n: int, confidence: float = 0.95) -> Estimate:
    """A share with the Wilson score interval (Wilson 1927), which is also valid at 0 and at n successes.

    Raises:
        StageFailed: n is 0.
        ValueError: `successes` is not in [0, n].
    """
    if n < 1:
        raise StageFailed("a share of 0 prompts has no value", "Evaluate on at least one prompt.")
    if not 0 <= successes <= n:
        raise ValueError(f"successes must be from 0 to n = {n}, not {successes}")
    low, high = _score_interval(successes / n, n, confidence)
    return Estimate(value=successes / n, low=low, high=high, n=n)


def bootstrap_mean(
    values: ArrayLike,
    clusters: Sequence[Hashable] | None = None,
    *,
    n_resamples: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
    name: str = "value",
) -> Estimate:
    """Mean of all values with an expanded percentile bootstrap interval (Hesterberg 2015; `bootstrap`).

    Args:
        values: (N,) finite numbers.
        clusters: the prompt of each value; prompts are resampled with all their values. None: each value is a
            prompt of its own. A prompt with more values has more weight, as in the plain mean.
        seed: equal seed and data give equal intervals.
        name: what an error calls a value.

    Raises:
        StageFailed: there are fewer than two clusters, or a value is not finite.
        ValueError: `clusters` has another length.
    """
    x = finite(values, name)
    sums, sizes = cluster_sums(x, clusters)
    require_two(len(sums))
    low, high = expanded_interval(resampled_means(sums, sizes, n_resamples, seed), len(sums), confidence)
    return Estimate(value=float(x.mean()), low=low, high=high, n=len(sums))


def paired_bootstrap(
    a: ArrayLike,
    b: ArrayLike,
    clusters: Sequence[Hashable] | None = None,
    *,
    n_resamples: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Estimate:
    """Mean of a - b, measured on the same items, with a bootstrap interval over prompts.

    If `low > 0`, a is larger than b at this confidence. Arguments and errors: `bootstrap_mean`.
    """
    differences = paired_difference(a, b)
    return bootstrap_mean(differences, clusters, n_resamples=n_resamples, seed=seed, confidence=confidence)


def bootstrap_statistic(
    function: Callable[..., float | None],
    arrays: Sequence[ArrayLike],
    clusters: Sequence[Hashable] | None = None,
    *,
    interval: Literal["percentile", "basic"] = "percentile",
    n_resamples: int = 1_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Estimate | None:
    """A statistic other than a mean (rank correlation, temperature, calibration error) with an interval.

    Args:
        function: computes the statistic from the arrays; returns None if it is undefined.
        arrays: N rows each, resampled together.
        clusters: the prompt of each row, as in `bootstrap_mean`.
        interval: the expanded percentile interval, or `basic`, its mirror image about the value (Davison &
            Hinkley 1997, section 5.2), for statistics that noise biases. The calibration error of few rows is
            too large, and that of their resamples larger still, so that percentiles are above the true value:
            for 60 pairs with a true error of 0.06 they never cover it, basic in 80 %; for 200 pairs with 0.10
            in 83 and 88 %; for 600 in 94 and 93 %. The value may be outside a basic interval, and an error of
            0 is in neither.

    Returns:
        None if the statistic is undefined for the data or in more than 1 % of the resamples, because an
        interval over the others would leave out a tail.

    Raises:
        StageFailed: fewer than two clusters.
        ValueError: the arrays or `clusters` have different lengths.
    """
    columns = [np.asarray(array) for array in arrays]
    if len({len(column) for column in columns}) != 1:
        counts = ", ".join(str(len(column)) for column in columns)
        raise ValueError(f"the arrays must have equally many rows, but have {counts}")
    codes = cluster_codes(clusters, len(columns[0]))
    members = np.split(np.argsort(codes, kind="stable"), np.cumsum(np.bincount(codes))[:-1])
    require_two(len(members) if len(codes) else 0)
    value = function(*columns)
    if value is None:
        return None
    generator = np.random.default_rng(seed)
    resampled = []
    for _ in range(n_resamples):
        rows = np.concatenate([members[i] for i in generator.integers(0, len(members), len(members))])
        resampled.append(function(*(column[rows] for column in columns)))
    defined = [statistic for statistic in resampled if statistic is not None]
    if len(defined) < (1 - _UNDEFINED) * n_resamples:
        return None
    low, high = expanded_interval(np.array(defined, np.float64), len(members), confidence)
    if interval == "basic":
        low, high = 2 * value - high, 2 * value - low
    return Estimate(value=float(value), low=low, high=high, n=len(members))


def win_rate(
    a: ArrayLike,
    b: ArrayLike,
    clusters: Sequence[Hashable] | None = None,
    *,
    confidence: float = 0.95,
) -> Estimate:
    """Share of items in which a's score beats b's; a tie counts one half. Interval and errors: `share`."""
    scores = (np.sign(paired_difference(a, b)) + 1) / 2
    return share(scores, clusters, confidence=confidence)


def share(
    values: ArrayLike,
    clusters: Sequence[Hashable] | None = None,
    *,
    confidence: float = 0.95,
    name: str = "value",
) -> Estimate:
    """Mean of values in [0, 1] (right or wrong, a win or half of one), with an interval within [0, 1].

    If every value is 0 or 1 and a prompt of its own, the interval is Wilson's. Otherwise it is Wilson's for
    the effective number of prompts, at which a plain share would vary as much as this one varies between
    prompts, with Student's t in place of the normal quantile (Korn & Graubard 1998, Survey Methodology 24(2);
    Wilson's form compared by Franco et al. 2019, Journal of Survey Statistics and Methodology 7(3)). A
    bootstrap covers as little as 88 % if the share is near 0 or 1. If all prompts have the same share (all
    right, all tied), their variation is uninformative and the number of prompts is used.

    Args:
        values: (N,) numbers in [0, 1].
        clusters: the prompt of each value, as in `bootstrap_mean`.
        name: what an error calls a value.

    Raises:
        StageFailed: there is no prompt, there is one prompt whose values differ, or a value is not finite.
        ValueError: a value is outside [0, 1], or `clusters` has another length.
    """
    x = finite(values, name)
    if len(x) and not 0 <= x.min() <= x.max() <= 1:
        raise ValueError(f"shares must be from 0 to 1, but these are from {x.min()} to {x.max()}")
    sums, sizes = cluster_sums(x, clusters)
    n = len(sums)
    same = n > 0 and np.ptp(sums / sizes) == 0
    if not same:
        require_two(n)
    p = float(x.mean()) if n else 0.0
    plain = n == len(x) and bool(np.isin(x, (0.0, 1.0)).all())
    size = n if plain or same else _effective_size(sums, sizes, confidence)
    low, high = _score_interval(p, size, confidence)
    return Estimate(value=p, low=low, high=high, n=n)


def share_difference(
    a: ArrayLike,
    b: ArrayLike,
    clusters: Sequence[Hashable] | None = None,
    *,
    confidence: float = 0.95,
) -> Estimate:
    """Mean of a - b, both in [0, 1] and measured on the same items.

    The interval is Newcombe's hybrid score interval with the correlation corrected for continuity (1998,
    Statistics in Medicine 17:2635, method 10), from the intervals of `share` and the correlation over
    prompts. Two models that agree on every item have an interval of positive width, where a bootstrap would
    have none. Arguments and errors: `share`.
    """
    x, y = finite(a), finite(b)
    value = float(paired_difference(x, y).mean()) if len(x) else 0.0
    first, second = (share(values, clusters, confidence=confidence) for values in (x, y))
    r = _correlation(x, y, clusters)

    def reach(x: float, y: float) -> float:
        return math.sqrt(max(0.0, x**2 - 2 * r * x * y + y**2))

    down = reach(first.value - first.low, second.high - second.value)
    up = reach(first.high - first.value, second.value - second.low)
    return Estimate(value=value, low=max(-1.0, value - down), high=min(1.0, value + up), n=first.n)


def _score_interval(p: float, n: float, confidence: float) -> tuple[float, float]:
    """Wilson's interval of a share p of n, which need not be an integer."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    center = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # Return exactly 0 and 1 at the ends, where rounding would give 1e-17.
    return 0.0 if p == 0 else (center - half) / scale, 1.0 if p == 1 else (center + half) / scale


def _effective_size(sums: Floats, sizes: Floats, confidence: float) -> float:
    """The n* for which p(1-p)/n* is the variance of the share over prompts, reduced for Student's t.

    One prompt with identical answers, of variance p(1-p), is added. If only a few prompts differ from the
    rest, the correlation of answers to the same prompt is poorly known, and assuming independence would make
    the interval too narrow (for 30 prompts with p = 0.95 it covers 90 %, with the added prompt 97 %).
    """
    n, total = len(sums), sizes.sum()
    p = sums.sum() / total
    of_prompt = n * ((sums - p * sizes) ** 2).sum() / total**2 * n / (n - 1)
    cautious = (n * of_prompt + p * (1 - p)) / (n + 1)
    shrunk = NormalDist().inv_cdf((1 + confidence) / 2) / student_quantile(confidence, n)
    return float(n * p * (1 - p) / cautious * shrunk**2)


def _correlation(x: Floats, y: Floats, clusters: Sequence[Hashable] | None) -> float:
    """Correlation of two shares over prompts, corrected for continuity if positive; 0 if a share is
    constant."""
    (sums_x, sizes), (sums_y, _) = cluster_sums(x, clusters), cluster_sums(y, clusters)
    p, q = x.mean(), y.mean()
    dx, dy = sums_x - p * sizes, sums_y - q * sizes
    spread = math.sqrt((dx @ dx) * (dy @ dy))
    if spread == 0 or p * (1 - p) * q * (1 - q) == 0:
        return 0.0
    r = float(dx @ dy) / spread
    correction = 1 / (2 * len(dx) * math.sqrt(p * (1 - p) * q * (1 - q)))
    return max(0.0, r - correction) if r > 0 else r
