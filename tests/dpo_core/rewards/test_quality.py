"""Metrics of a reward model on data with known answers."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_core.errors import StageFailed
from dpo_core.rewards.quality import (
    RewardQuality,
    best_temperature,
    calibration_error,
    reward_quality,
    spearman,
)

N = 20_000


def drawn(seed: int = 0, n: int = N) -> np.ndarray:
    """Gaps of the chosen over the rejected answer, labels drawn with the probabilities that the gaps say."""
    rng = np.random.default_rng(seed)
    gap = rng.normal(0, 1.5, n)
    return np.where(rng.random(n) < 1 / (1 + np.exp(-gap)), gap, -gap)


def quality(gap: np.ndarray, **settings: float) -> RewardQuality:
    lengths = np.arange(len(gap))
    return reward_quality(gap, np.zeros(len(gap)), lengths, lengths + 1, **settings)


def test_a_calibrated_model_is_found_to_be_one() -> None:
    gap = drawn()
    result = quality(gap)
    assert result.ece < 0.012
    assert result.temperature == pytest.approx(1, abs=0.04)
    assert result.accuracy.value == pytest.approx((gap > 0).mean())
    assert result.accuracy.low < result.accuracy.value < result.accuracy.high
    assert result.accuracy.n == result.pairs == N
    # Both are what the model itself expects: E p(1-p), and the mean entropy of its probabilities.
    p = 1 / (1 + np.exp(-gap))
    assert result.brier == pytest.approx((p * (1 - p)).mean(), abs=0.005)
    assert result.nll == pytest.approx(-(p * np.log(p) + (1 - p) * np.log(1 - p)).mean(), abs=0.01)


@pytest.mark.parametrize("factor", [2.0, 0.5])
def test_scores_times_a_factor_are_that_much_too_sure(factor: float) -> None:
    right, wrong = quality(drawn()), quality(factor * drawn())
    assert wrong.temperature == pytest.approx(factor * (right.temperature or 0), rel=1e-9)
    assert wrong.accuracy == right.accuracy
    assert wrong.ece > right.ece + 0.05
    assert wrong.brier > right.brier + 0.003
    assert wrong.nll > right.nll + 0.01


def test_rewards_that_were_rescaled_after_training_are_measured_on_the_scale_of_the_loss() -> None:
    plain, rescaled = quality(drawn()), quality(0.37 * drawn(), scale=0.37)
    for name in ("ece", "brier", "nll", "temperature"):
        assert getattr(rescaled, name) == pytest.approx(getattr(plain, name), rel=1e-9)


def test_the_order_of_the_answers_is_random_and_seeded() -> None:
    """Equal rewards are a coin: right half of the time, and not always as the label would have it."""
    ties = quality(np.zeros(N), seed=1)
    assert ties.ece < 0.02
    assert ties.brier == 0.25
    assert ties.nll == pytest.approx(math.log(2))
    assert ties.accuracy.value == 0, "strictly larger"
    assert ties.temperature is None
    assert quality(np.zeros(50), seed=1) == quality(np.zeros(50), seed=1)
    assert quality(np.zeros(50), seed=1).ece != quality(np.zeros(50), seed=2).ece


def test_calibration_error_by_hand() -> None:
    # Two bins of two: confidences 0.6 and 0.7 with one right, 0.8 and 1.0 with both right.
    p, happened = [0.6, 0.3, 0.2, 1.0], [True, True, False, True]
    assert calibration_error(p, happened, bins=2) == pytest.approx((abs(0.5 - 0.65) + abs(1 - 0.9)) / 2)
    assert calibration_error([0.9], [True]) == pytest.approx(0.1), "fewer rows than bins"
    # Equal mass: a bin more does not hold what its width would.
    assert calibration_error([0.5, 0.5, 0.5, 0.99], [True, False, True, True], bins=2) == pytest.approx(
        (abs(0.5 - 0.5) + abs(1 - 0.745)) / 2
    )


@given(st.lists(st.floats(-20, 20).filter(lambda x: abs(x) > 1e-3), min_size=2, max_size=30))
@settings(max_examples=60)
def test_no_other_temperature_fits_better(gaps: list[float]) -> None:
    gap = np.array(gaps)

    def nll(inverse: float) -> float:
        return float(np.logaddexp(0, -gap * inverse).mean())

    temperature = best_temperature(gap)
    if temperature is None:
        # Then either end is as good as any: all pairs right, or gaps that point the wrong way.
        assert (gap > 0).all() or gap.mean() <= 0
        return
    assert all(nll(1 / temperature) <= nll(inverse) + 1e-12 for inverse in np.logspace(-4, 4, 200))


def test_no_temperature_mends_what_is_perfect_or_backwards() -> None:
    assert best_temperature([1.0, 2.0]) is None
    assert best_temperature([-1.0, 0.5]) is None
    # By hand: one wrong of four equal gaps wants σ(gap/T) = 3/4.
    assert best_temperature([2.0, 2.0, 2.0, -2.0]) == pytest.approx(2 / math.log(3))


def test_spearman_of_the_reward_with_length() -> None:
    rng = np.random.default_rng(3)
    chosen, rejected = rng.integers(1, 90, 200), rng.integers(1, 90, 200)
    for sign in (1, -1):
        result = reward_quality(sign * chosen**3.0, sign * rejected**3.0, chosen, rejected)
        assert result.length_spearman == pytest.approx(sign)
        assert result.gap_spearman == pytest.approx(sign, abs=0.1), "a cube of a gap is not the gap of cubes"
        linear = reward_quality(sign * chosen, sign * rejected, chosen, rejected)
        assert linear.gap_spearman == pytest.approx(sign)
    unrelated = reward_quality(rng.normal(size=200), rng.normal(size=200), chosen, rejected)
    assert abs(unrelated.length_spearman or 1) < 0.15
    assert abs(unrelated.gap_spearman or 1) < 0.2
    same = reward_quality(rng.normal(size=9), rng.normal(size=9), [5] * 9, [5] * 9)
    assert same.length_spearman is same.gap_spearman is None


def test_spearman_shares_the_ranks_of_equal_values() -> None:
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    scipy_stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 6, 80), rng.integers(0, 6, 80)
    assert spearman(x, y) == pytest.approx(scipy_stats.spearmanr(x, y).statistic, abs=1e-12)


def test_no_pairs_have_no_quality() -> None:
    with pytest.raises(StageFailed):
        reward_quality([], [], [], [])
