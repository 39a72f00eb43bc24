"""95 % intervals hold the truth in 93 to 97 % of 1,000 simulated evaluations of 30, 60 and 200 prompts.

The default run has those of 30 prompts, where intervals are hardest to get right. Each case draws a thousand
evaluations from a population whose truth is known and counts. The number of resamples is reduced: 1,000 give
a 2.5 % tail to within half a percent.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np
import pytest

from dpo_core.rewards.quality import calibration_error, spearman
from dpo_core.statistics.estimates import (
    Estimate,
    bootstrap_mean,
    bootstrap_statistic,
    paired_bootstrap,
    share,
    share_difference,
)
from dpo_core.statistics.significance import bootstrap_p

EVALUATIONS, RESAMPLES, SAMPLES = 1000, 1000, 4
PROMPTS = (30, pytest.param(60, marks=pytest.mark.slow), pytest.param(200, marks=pytest.mark.slow))

Evaluate = Callable[[np.random.Generator, int], Estimate]


def coverage(evaluate: Evaluate, truth: float, n: int, evaluations: int = EVALUATIONS) -> float:
    rng = np.random.default_rng(n)
    found = [evaluate(rng, n) for _ in range(evaluations)]
    assert all(estimate.n == n for estimate in found)
    # An end may lie on the truth itself, where rounding decides.
    return float(np.mean([e.low - 1e-12 <= truth <= e.high + 1e-12 for e in found]))


def clusters(n: int) -> list[int]:
    return np.repeat(np.arange(n), SAMPLES).tolist()


def skewed(rng: np.random.Generator, n: int) -> np.ndarray:
    """(n·4,): an exponential difficulty of the prompt, of mean 1, and exponential noise of mean 1."""
    return np.repeat(rng.exponential(size=n), SAMPLES) + rng.exponential(size=n * SAMPLES)


def answered(rng: np.random.Generator, n: int, p: float, alike: float) -> np.ndarray:
    """(n·4,): 0 or 1 with mean p; `alike` is the correlation of two answers to one prompt."""
    chance = rng.beta(p * (1 / alike - 1), (1 - p) * (1 / alike - 1), n)
    return (rng.random(n * SAMPLES) < np.repeat(chance, SAMPLES)).astype(float)


@pytest.mark.parametrize("n", PROMPTS)
def test_mean_of_skewed_values_of_four_samples_a_prompt(n: int) -> None:
    names = clusters(n)

    def evaluate(rng: np.random.Generator, n: int) -> Estimate:
        return bootstrap_mean(skewed(rng, n), names, n_resamples=RESAMPLES)

    assert 0.93 <= coverage(evaluate, 2.0, n) <= 0.97


def test_plain_percentiles_would_be_too_narrow() -> None:
    """What the expanded interval mends: the quantiles at 2.5 % of the same resamples lose 1 % and more."""
    n, rng = 30, np.random.default_rng(0)
    expanded = plain = 0
    weights = rng.multinomial(n, np.full(n, 1 / n), RESAMPLES) / n
    for _ in range(EVALUATIONS):
        values = rng.normal(size=n)
        low, high = np.quantile(weights @ values, [0.025, 0.975])
        plain += low <= 0 <= high
        estimate = bootstrap_mean(values, n_resamples=RESAMPLES)
        expanded += estimate.low <= 0 <= estimate.high
    assert plain / EVALUATIONS < 0.945
    assert expanded - plain >= 8


def test_few_prompts_with_a_heavy_tail_are_where_it_falls_short() -> None:
    """Log-normal values: what few prompts have not shown, no resample shows."""

    def evaluate(rng: np.random.Generator, n: int) -> Estimate:
        return bootstrap_mean(rng.lognormal(size=n), n_resamples=RESAMPLES)

    assert 0.84 <= coverage(evaluate, np.exp(0.5), 30) <= 0.90


@pytest.mark.parametrize("n", PROMPTS)
def test_paired_difference_of_two_skewed_policies(n: int) -> None:
    names = clusters(n)

    def evaluate(rng: np.random.Generator, n: int) -> Estimate:
        baseline = skewed(rng, n)
        gain = np.repeat(rng.exponential(0.5, n), SAMPLES) + rng.normal(size=n * SAMPLES)
        return paired_bootstrap(baseline + gain, baseline, names, n_resamples=RESAMPLES)

    assert 0.93 <= coverage(evaluate, 0.5, n) <= 0.97


@pytest.mark.parametrize("n", PROMPTS)
def test_share_of_one_answer_a_prompt(n: int) -> None:
    """Shares drawn anew for each evaluation: at one share the coverage of any interval jumps with n."""
    hits = []
    rng = np.random.default_rng(n)
    for p in rng.uniform(0.02, 0.98, EVALUATIONS):
        estimate = share((rng.random(n) < p).astype(float))
        hits.append(estimate.low <= p <= estimate.high)
    assert 0.93 <= np.mean(hits) <= 0.97


@pytest.mark.parametrize("n", PROMPTS)
@pytest.mark.parametrize(
    ("p", "alike"),
    [
        (0.5, 0.1),
        (0.9, 0.5),
        pytest.param(0.5, 0.5, marks=pytest.mark.slow),
        pytest.param(0.9, 0.1, marks=pytest.mark.slow),
    ],
)
def test_share_of_four_answers_a_prompt(n: int, p: float, alike: float) -> None:
    names = clusters(n)

    def evaluate(rng: np.random.Generator, n: int) -> Estimate:
        return share(answered(rng, n, p, alike), names)

    # Quick to compute: four thousand evaluations tell 93.9 % (n = 30, p = 0.9, alike = 0.5) from 93 %.
    assert 0.93 <= coverage(evaluate, p, n, 4 * EVALUATIONS) <= 0.97


def test_shares_near_the_edge_hold_where_a_bootstrap_does_not() -> None:
    n, p = 60, 0.95
    names = clusters(n)

    def scored(rng: np.random.Generator, n: int) -> Estimate:
        return share(answered(rng, n, p, 0.1), names)

    def resampled(rng: np.random.Generator, n: int) -> Estimate:
        return bootstrap_mean(answered(rng, n, p, 0.5), names, n_resamples=200)

    assert 0.93 <= coverage(scored, p, n) <= 0.97
    assert coverage(resampled, p, n) < 0.93


@pytest.mark.parametrize("n", PROMPTS)
def test_win_rate_with_ties(n: int) -> None:
    def evaluate(rng: np.random.Generator, n: int) -> Estimate:
        return share(rng.choice([1.0, 0.5, 0.0], p=[0.5, 0.2, 0.3], size=n))

    assert 0.93 <= coverage(evaluate, 0.6, n) <= 0.97


@pytest.mark.parametrize("n", PROMPTS)
def test_difference_of_two_shares_on_the_same_prompts(n: int) -> None:
    """Both right, a alone, b alone, neither: 52, 23, 8 and 17 %."""

    def evaluate(rng: np.random.Generator, n: int) -> Estimate:
        kind = rng.choice(4, p=[0.52, 0.23, 0.08, 0.17], size=n)
        return share_difference(kind <= 1, (kind == 0) | (kind == 2))

    assert 0.93 <= coverage(evaluate, 0.15, n) <= 0.97


@pytest.mark.parametrize("n", PROMPTS)
def test_equal_policies_are_told_apart_in_one_evaluation_of_twenty(n: int) -> None:
    """The bootstrap test keeps its level of 5 % under the null hypothesis, at few prompts too."""
    names, rng, found = clusters(n), np.random.default_rng(n), 0
    for _ in range(EVALUATIONS):
        a, b = (np.repeat(rng.normal(size=n), SAMPLES) + rng.normal(size=n * SAMPLES) for _ in range(2))
        found += bootstrap_p(a, b, names, n_resamples=RESAMPLES) <= 0.05
    assert 0.03 <= found / EVALUATIONS <= 0.07


@pytest.mark.slow
def test_rank_correlation() -> None:
    """Of a bivariate normal with correlation ρ it is 6/π·asin(ρ/2) (Kendall 1948)."""

    def evaluate(rng: np.random.Generator, n: int) -> Estimate:
        x = rng.normal(size=n)
        estimate = bootstrap_statistic(spearman, [x, 0.6 * x + 0.8 * rng.normal(size=n)], n_resamples=400)
        assert estimate is not None
        return estimate

    assert 0.93 <= coverage(evaluate, 6 / np.pi * np.arcsin(0.3), 60) <= 0.97


@pytest.mark.slow
def test_calibration_error_needs_the_basic_interval() -> None:
    """60 pairs of a model whose gaps are half again what they should be. Resamples repeat rows, which raises
    the error by about what chance raised it at first: percentiles lie above the truth."""

    def drawn(rng: np.random.Generator, n: int) -> list[np.ndarray]:
        gap = rng.normal(0, 1.5, n)
        return [1 / (1 + np.exp(-1.5 * gap)), rng.random(n) < 1 / (1 + np.exp(-gap))]

    truth = calibration_error(*drawn(np.random.default_rng(0), 400_000))

    def evaluate(kind: Literal["percentile", "basic"]) -> Evaluate:
        def estimate(rng: np.random.Generator, n: int) -> Estimate:
            found = bootstrap_statistic(calibration_error, drawn(rng, n), interval=kind, n_resamples=200)
            assert found is not None
            return found

        return estimate

    plain, basic = (coverage(evaluate(kind), truth, 60, 200) for kind in ("percentile", "basic"))
    assert plain < 0.1
    assert basic > 0.7
