"""Intervals: published values, hand-made data, and coverage measured by simulation."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from dpo_core.errors import StageFailed
from dpo_core.stats import Estimate, bootstrap_mean, paired_bootstrap, wilson, win_rate


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(61, 100, 0.512, 0.700), (157, 256, 0.552, 0.671), (0, 50, 0.0, 0.071), (50, 50, 0.929, 1.0)],
)
def test_wilson(successes: int, n: int, low: float, high: float) -> None:
    estimate = wilson(successes, n)
    assert estimate.value == successes / n
    assert estimate.low == pytest.approx(low, abs=5e-4)
    assert estimate.high == pytest.approx(high, abs=5e-4)
    assert estimate.n == n


def test_wilson_ends_exactly_at_0_and_1() -> None:
    assert wilson(0, 7).low == 0.0
    assert wilson(7, 7).high == 1.0


@given(n=st.integers(1, 2000), data=st.data())
def test_wilson_is_symmetric_and_contains_the_share(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, n))
    estimate, mirror = wilson(k, n), wilson(n - k, n)
    assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1
    assert estimate.low == pytest.approx(1 - mirror.high, abs=1e-12)
    wider = wilson(k, n, confidence=0.99)
    assert wider.high - wider.low > estimate.high - estimate.low or n == 1


def test_wilson_refuses_nonsense() -> None:
    with pytest.raises(StageFailed):
        wilson(0, 0)
    with pytest.raises(ValueError, match="8 successes of 7"):
        wilson(8, 7)


def test_bootstrap_interval_of_many_values_is_the_normal_one() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 2000)
    estimate = bootstrap_mean(values)
    half = 1.96 * values.std() / np.sqrt(2000)
    assert estimate.value == pytest.approx(values.mean(), rel=1e-12)
    assert estimate.high - estimate.value == pytest.approx(half, rel=0.05)
    assert estimate.value - estimate.low == pytest.approx(half, rel=0.05)
    assert estimate.n == 2000


def test_bootstrap_of_two_values_by_hand() -> None:
    """Resamples of {0, 1} have the means 0, ½, 1 with the probabilities ¼, ½, ¼."""
    assert bootstrap_mean([0.0, 1.0]) == Estimate(value=0.5, low=0.0, high=1.0, n=2)
    middle = bootstrap_mean([0.0, 1.0], confidence=0.4)
    assert (middle.low, middle.high) == (0.5, 0.5)


def test_same_seed_same_interval() -> None:
    values = np.random.default_rng(1).normal(size=50)
    assert bootstrap_mean(values, seed=3) == bootstrap_mean(values, seed=3)
    assert bootstrap_mean(values, seed=3) != bootstrap_mean(values, seed=4)


def test_repeating_each_judgement_buys_no_certainty() -> None:
    values = np.random.default_rng(2).normal(size=60)
    once = bootstrap_mean(values)
    clustered = bootstrap_mean(np.repeat(values, 8), clusters=np.repeat(np.arange(60), 8).tolist())
    assert clustered.n == 60
    assert (clustered.low, clustered.high) == pytest.approx((once.low, once.high), rel=1e-12)
    naive = bootstrap_mean(np.repeat(values, 8))
    assert naive.high - naive.low < 0.5 * (once.high - once.low)


def test_clusters_of_unequal_size() -> None:
    values = [0.0, 1.0, 1.0, 1.0]
    estimate = bootstrap_mean(values, clusters=["a", "b", "b", "b"])
    # Resamples of the clusters: (a,a) → 0, (a,b) → 3/4, (b,b) → 1: the ratio of sums, not the mean of means.
    assert estimate == Estimate(value=0.75, low=0.0, high=1.0, n=2)
    middle = bootstrap_mean(values, clusters=["a", "b", "b", "b"], confidence=0.4)
    assert (middle.low, middle.high) == (0.75, 0.75)


def test_paired_comparison_sees_what_two_intervals_hide() -> None:
    rng = np.random.default_rng(3)
    difficulty = rng.normal(0, 5, 100)
    a, b = difficulty + 0.3 + rng.normal(0, 0.5, 100), difficulty + rng.normal(0, 0.5, 100)
    assert bootstrap_mean(a).low < bootstrap_mean(b).high
    estimate = paired_bootstrap(a, b)
    assert estimate.value == pytest.approx(a.mean() - b.mean())
    assert estimate.low > 0
    assert paired_bootstrap(a, a) == Estimate(value=0.0, low=0.0, high=0.0, n=100)


def test_win_rate_without_ties_is_wilson() -> None:
    a = [1.0] * 61 + [0.0] * 39
    assert win_rate(a, [0.5] * 100) == wilson(61, 100)
    assert win_rate(a, [0.5] * 100, clusters=list(range(100))) == wilson(61, 100)


def test_win_rate_counts_ties_half_and_bootstraps_them() -> None:
    a = [1.0] * 50 + [0.0] * 30 + [-1.0] * 20
    estimate = win_rate(a, [0.0] * 100)
    assert estimate.value == 0.65
    half = 1.96 * np.std([1.0] * 50 + [0.5] * 30 + [0.0] * 20) / 10
    assert estimate.high - estimate.value == pytest.approx(half, rel=0.1)
    swapped = win_rate([0.0] * 100, a)
    assert swapped.value == pytest.approx(0.35)


def test_win_rate_over_prompts_with_several_samples() -> None:
    # 20 prompts of 5 samples, all five decided alike: the evidence is that of 20 games.
    won = np.repeat([1.0] * 14 + [-1.0] * 6, 5)
    clustered = win_rate(won, np.zeros(100), clusters=np.repeat(np.arange(20), 5).tolist())
    assert clustered.value == pytest.approx(0.7)
    assert clustered.n == 20
    assert clustered.high - clustered.low > 1.8 * (wilson(70, 100).high - wilson(70, 100).low)


def test_unanimous_win_rates_do_not_claim_certainty() -> None:
    prompts = np.repeat(np.arange(10), 3).tolist()
    assert win_rate(np.ones(30), np.zeros(30), clusters=prompts) == wilson(10, 10)
    assert win_rate(np.zeros(30), np.zeros(30), clusters=prompts) == wilson(5, 10)


def test_bad_values_are_named() -> None:
    with pytest.raises(StageFailed, match="value 1 of 3 is nan"):
        bootstrap_mean([1.0, float("nan"), 2.0])
    with pytest.raises(StageFailed, match="at least 2 prompts, not 1"):
        bootstrap_mean([1.0, 2.0], clusters=["a", "a"])
    with pytest.raises(StageFailed, match="at least 2 prompts, not 0"):
        win_rate([], [])
    with pytest.raises(ValueError, match="3 cluster names for 2 values"):
        bootstrap_mean([1.0, 2.0], clusters=["a", "b", "c"])
    with pytest.raises(ValueError, match="2 and 3 items"):
        paired_bootstrap([1.0, 2.0], [1.0, 2.0, 3.0])


def test_estimate_is_frozen_finite_and_readable() -> None:
    estimate = Estimate(value=0.61, low=0.512, high=0.7, n=100)
    assert str(estimate) == "0.61 [0.512, 0.7] (n=100)"
    with pytest.raises(ValidationError):
        estimate.value = 1.0  # type: ignore[misc]
    with pytest.raises(ValidationError):
        Estimate(value=float("nan"), low=0, high=1, n=1)


def test_ten_thousand_resamples_of_500_clusters_take_under_a_second() -> None:
    rng = np.random.default_rng(4)
    clusters = rng.integers(0, 500, 5000).tolist()  # unequal sizes: the slower path
    values = rng.normal(size=5000)
    took = []
    for _ in range(3):  # the best of three: other work on the machine is not the subject
        start = time.perf_counter()
        bootstrap_mean(values, clusters)
        took.append(time.perf_counter() - start)
    assert min(took) < 1.0


def test_coverage_of_the_clustered_bootstrap() -> None:
    """The true mean lies in 95 % of the intervals; ignoring the clusters loses far too many."""
    rng = np.random.default_rng(5)
    n_data, n_prompts, per_prompt = 1000, 100, 4
    prompts = np.repeat(np.arange(n_prompts), per_prompt).tolist()
    covered = naive_covered = 0
    for seed in range(n_data):
        effects = np.repeat(rng.normal(size=n_prompts), per_prompt)
        values = 2.0 + effects + rng.normal(size=n_prompts * per_prompt)
        estimate = bootstrap_mean(values, prompts, n_resamples=2000, seed=seed)
        covered += estimate.low <= 2.0 <= estimate.high
        if seed < 200:
            naive = bootstrap_mean(values, n_resamples=500, seed=seed)
            naive_covered += naive.low <= 2.0 <= naive.high
    assert 0.93 <= covered / n_data <= 0.97
    assert naive_covered / 200 < 0.88
