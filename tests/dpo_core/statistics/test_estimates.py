"""Intervals: published values and hand-made data; `test_coverage` measures their coverage."""

import time

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from dpo_core.errors import StageFailed
from dpo_core.rewards.quality import spearman
from dpo_core.statistics.estimates import (
    Estimate,
    bootstrap_mean,
    bootstrap_statistic,
    paired_bootstrap,
    share,
    share_difference,
    wilson,
    win_rate,
)


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
    with pytest.raises(ValueError, match="successes must be from 0 to n = 7, not 8"):
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
    # t with 1 degree of freedom at 10 % from its middle is tan(π/10); √2 of that leaves Φ = 0.32 below.
    middle = bootstrap_mean([0.0, 1.0], confidence=0.2)
    assert (middle.low, middle.high) == (0.5, 0.5)
    assert bootstrap_mean([0.0, 1.0], confidence=0.4).low == 0.0, "Φ(-√2·tan(π/5)) = 0.15, below one quarter"


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
    middle = bootstrap_mean(values, clusters=["a", "b", "b", "b"], confidence=0.2)
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


def test_win_rate_counts_ties_half() -> None:
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
    with pytest.raises(StageFailed, match=r"value 1 of 3 is nan \(1 in total are not finite\)"):
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


def test_ten_thousand_resamples_of_500_clusters_take_about_a_second() -> None:
    rng = np.random.default_rng(4)
    clusters = rng.integers(0, 500, 5000).tolist()  # unequal sizes: the slower path
    values = rng.normal(size=5000)
    took = []
    for _ in range(3):  # the best of three: other work on the machine is not the subject
        start = time.process_time()
        bootstrap_mean(values, clusters)
        took.append(time.process_time() - start)
    assert min(took) < 2


def test_the_interval_is_expanded_as_students_t_asks() -> None:
    """Of normal values it is nearly Student's, which the plain percentiles of 8 values miss by a quarter."""
    values = np.random.default_rng(0).normal(size=8)
    student = scipy.stats.t.interval(0.95, 7, values.mean(), scipy.stats.sem(values))
    estimate = bootstrap_mean(values, n_resamples=20_000)
    assert estimate.high - estimate.low == pytest.approx(student[1] - student[0], rel=0.1)
    tail = scipy.stats.norm.cdf(-scipy.stats.t.ppf(0.975, 7) * np.sqrt(8 / 7))
    means = scipy.stats.bootstrap(
        (values,), np.mean, method="percentile", confidence_level=1 - 2 * tail, n_resamples=20_000, rng=1
    ).confidence_interval
    assert (estimate.low, estimate.high) == pytest.approx((means.low, means.high), abs=0.04)


def test_wilson_as_scipy_has_it() -> None:
    for successes, n in ((0, 12), (3, 17), (61, 100), (999, 1000)):
        estimate = wilson(successes, n, confidence=0.9)
        reference = scipy.stats.binomtest(successes, n).proportion_ci(0.9, method="wilson")
        assert (estimate.low, estimate.high) == pytest.approx((reference.low, reference.high), abs=1e-12)


def test_share_of_several_answers_lies_between_that_of_prompts_and_that_of_answers() -> None:
    rng = np.random.default_rng(6)
    prompts = np.repeat(np.arange(50), 4).tolist()
    independent = (rng.random(200) < 0.8).astype(float)
    alike = np.repeat((rng.random(50) < 0.8).astype(float), 4)

    def width(values: np.ndarray, clusters: list[int] | None) -> float:
        estimate = share(values, clusters)
        return estimate.high - estimate.low

    # Within what 50 prompts tell of how alike their answers are, and Student's t of 49 degrees of freedom.
    assert width(independent, prompts) == pytest.approx(width(independent, None), rel=0.15)
    assert width(alike, prompts) == pytest.approx(width(alike[::4], None), rel=0.05)
    assert width(alike, prompts) > 1.8 * width(alike, None)


@given(data=st.data(), n=st.integers(2, 20))
def test_a_share_holds_its_value_and_stays_in_its_range(data: st.DataObject, n: int) -> None:
    values = data.draw(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=2 * n, max_size=2 * n))
    clusters = [i // 2 for i in range(2 * n)]
    estimate, mirror = share(values, clusters), share([1 - v for v in values], clusters)
    assert 0 <= estimate.low <= estimate.value + 1e-12
    assert estimate.value - 1e-12 <= estimate.high <= 1
    assert (mirror.low, mirror.high) == pytest.approx((1 - estimate.high, 1 - estimate.low), abs=1e-9)
    other = data.draw(st.permutations(values))
    difference, turned = share_difference(values, other, clusters), share_difference(other, values, clusters)
    assert difference.low <= difference.value <= difference.high
    assert (turned.low, turned.high) == pytest.approx((-difference.high, -difference.low), abs=1e-9)


def pair(both: int, first: int, second: int, neither: int) -> tuple[list[float], list[float]]:
    """Paired answers by how many both, the first alone, the second alone and neither have right."""
    counts = (both, first, second, neither)
    return np.repeat([1.0, 1, 0, 0], counts).tolist(), np.repeat([1.0, 0, 1, 0], counts).tolist()


def test_difference_of_paired_shares_as_published() -> None:
    """Newcombe (1998, Statistics in Medicine 17:2635), method 10 on his example of 50 pairs."""
    estimate = share_difference(*pair(36, 12, 2, 0))
    assert estimate.value == pytest.approx(0.2)
    assert (estimate.low, estimate.high) == pytest.approx((0.0569, 0.3404), abs=5e-5)
    assert estimate.n == 50


def test_agreement_on_every_item_is_not_certainty() -> None:
    estimate = share_difference(*pair(45, 0, 0, 15))
    assert estimate.value == 0
    assert -0.05 < estimate.low < 0 < estimate.high < 0.05
    assert paired_bootstrap(*pair(45, 0, 0, 15)).high == 0, "what a bootstrap would say"
    # By hand: half of 60 right, so that both ends of Wilson's interval are as far; r = 1 - 1/(2·60·¼).
    half = wilson(30, 60).high - 0.5
    assert share_difference(*pair(30, 0, 0, 30)).high == pytest.approx(half * np.sqrt(2 / 30))


def test_unrelated_shares_differ_as_independent_ones() -> None:
    """Without correlation the paired interval is Newcombe's for two samples of that size."""
    estimate = share_difference(*pair(24, 36, 16, 24))
    first, second = wilson(60, 100), wilson(40, 100)
    low = 0.2 - np.hypot(0.6 - first.low, second.high - 0.4)
    high = 0.2 + np.hypot(first.high - 0.6, 0.4 - second.low)
    assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=1e-9)


def test_statistic_that_is_no_mean() -> None:
    rng = np.random.default_rng(7)
    x = rng.normal(size=80)
    mean = bootstrap_statistic(lambda a: float(a.mean()), [x], n_resamples=4000)
    reference = bootstrap_mean(x)
    assert mean is not None
    assert (mean.value, mean.n) == (pytest.approx(reference.value), 80)
    assert (mean.low, mean.high) == pytest.approx((reference.low, reference.high), abs=0.02)
    rank = bootstrap_statistic(spearman, [x, x + rng.normal(size=80)], n_resamples=500)
    assert rank is not None
    assert -1 <= rank.low < rank.value < rank.high <= 1


def test_a_statistic_is_resampled_by_prompt_with_its_rows_together() -> None:
    rng = np.random.default_rng(8)
    x, prompts = rng.normal(size=40), np.repeat(np.arange(40), 6)
    order = rng.permutation(240)
    calls = []

    def watched(a: np.ndarray, b: np.ndarray) -> float:
        assert (b == a**3).all()
        calls.append(np.unique(a, return_counts=True)[1])
        return float(a.mean())

    columns = [np.repeat(x, 6)[order], np.repeat(x**3, 6)[order]]
    clustered = bootstrap_statistic(watched, columns, prompts[order].tolist(), n_resamples=1500)
    reference = bootstrap_mean(x)
    assert clustered is not None
    assert clustered.n == 40
    assert (clustered.low, clustered.high) == pytest.approx((reference.low, reference.high), abs=0.04)
    assert all((counts % 6 == 0).all() for counts in calls)


def test_a_basic_interval_mirrors_the_percentiles() -> None:
    x = np.random.default_rng(9).exponential(size=30)
    plain = bootstrap_statistic(np.var, [x], n_resamples=300)
    basic = bootstrap_statistic(np.var, [x], n_resamples=300, interval="basic")
    assert plain is not None
    assert basic is not None
    assert basic.low == pytest.approx(2 * plain.value - plain.high)
    assert basic.high == pytest.approx(2 * plain.value - plain.low)


def test_a_statistic_that_is_often_undefined_has_no_interval() -> None:
    assert bootstrap_statistic(spearman, [[1, 1, 1], [1, 2, 3]]) is None
    # Of three rows one resample in nine is of one row alone, which has no rank correlation.
    assert bootstrap_statistic(spearman, [[1, 2, 3], [1, 3, 2]]) is None
    with pytest.raises(ValueError, match="equally many rows, but have 2, 3"):
        bootstrap_statistic(spearman, [[1, 2], [1, 2, 3]])
    with pytest.raises(StageFailed, match="at least 2 prompts, not 1"):
        bootstrap_statistic(spearman, [[1, 2], [1, 2]], ["a", "a"])
    with pytest.raises(StageFailed, match="at least 2 prompts, not 0"):
        bootstrap_statistic(spearman, [[], []])


def test_shares_outside_their_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shares must be from 0 to 1, but these are from -0\.5 to 1\.0"):
        share([1.0, -0.5])
