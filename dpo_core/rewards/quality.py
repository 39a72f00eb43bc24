"""Quality of a reward model on held-out pairs: accuracy, calibration, and correlation with length.

Shapes: N pairs, M numbers. The probabilities are those of the Bradley-Terry loss, p(A beats B) = σ(r_A -
r_B). If the rewards were rescaled after training, they are measured on the scale of the loss.
"""

import numpy as np
from numpy.typing import ArrayLike
from pydantic import Field

from dpo_core.config import Config
from dpo_core.statistics.estimates import Estimate, Floats, wilson

BINS = 10
_STEPS = 200  # bisection steps for the temperature, beyond the precision of a float


class RewardQuality(Config):
    """Metrics of a reward model on held-out pairs."""

    pairs: int = Field(ge=1)
    """Number of held-out pairs."""
    accuracy: Estimate
    """Share of pairs whose chosen answer has the strictly larger reward; Wilson interval."""
    ece: float
    """Expected calibration error over ten bins of equal size; biased upwards for few pairs."""
    brier: float
    """Mean squared error of the probabilities; 0.25 for random guessing."""
    nll: float
    """Mean negative log-likelihood in nats; ln 2 for random guessing."""
    temperature: float | None
    """The divisor of the gaps that fits best; above 1 the model is overconfident. None if no finite value is
    best: every pair is ranked correctly, or the gaps are uninformative."""
    length_spearman: float | None
    """Rank correlation of the reward with the length of the completion in tokens; None if one is constant."""
    gap_spearman: float | None
    """Rank correlation of reward gaps with length gaps, each pair in both orders."""


def reward_quality(
    chosen_N: ArrayLike, rejected_N: ArrayLike, lengths_chosen_N: ArrayLike, lengths_rejected_N: ArrayLike,
    *, scale: float = 1.0, seed: int = 0,
) -> RewardQuality:  # fmt: skip
    """Measure rewards of held-out pairs.

    Args:
        chosen_N, rejected_N: rewards.
        lengths_chosen_N, lengths_rejected_N: lengths of the completions in tokens.
        scale: factor by which the rewards were multiplied after training (a reward model's `gain`).
        seed: seed of the random order of each pair's answers in the calibration.

    Raises:
        StageFailed: there are no pairs.
    """
    chosen, rejected = np.asarray(chosen_N, np.float64), np.asarray(rejected_N, np.float64)
    gap_N = (chosen - rejected) / scale
    accuracy = wilson(int((gap_N > 0).sum()), len(gap_N))
    # Answers are in random order, so that "A is better" is not always true and a tie is right half of the
    # time.
    a_is_chosen_N = np.random.default_rng(seed).random(len(gap_N)) < 0.5
    logit_N = np.where(a_is_chosen_N, gap_N, -gap_N)
    p_N = _sigmoid(logit_N)
    long, short = np.asarray(lengths_chosen_N, np.float64), np.asarray(lengths_rejected_N, np.float64)
    return RewardQuality(
        pairs=len(gap_N),
        accuracy=accuracy,
        ece=calibration_error(p_N, a_is_chosen_N),
        brier=float(np.mean((p_N - a_is_chosen_N) ** 2)),
        nll=_nll(gap_N),
        temperature=best_temperature(gap_N),
        length_spearman=spearman(np.concatenate([chosen, rejected]), np.concatenate([long, short])),
        gap_spearman=spearman(np.concatenate([gap_N, -gap_N]), np.concatenate([long - short, short - long])),
    )


def calibration_error(p_N: ArrayLike, happened_N: ArrayLike, bins: int = BINS) -> float:
    """Expected calibration error: Σ (share of bin)·|accuracy - confidence| over bins of equal size.

    Args:
        p_N: probabilities of the event; the confidence in the likelier outcome is max(p, 1 - p).
        happened_N: whether the event happened.
    """
    p, happened = np.asarray(p_N, np.float64), np.asarray(happened_N, bool)
    confidence, right = np.maximum(p, 1 - p), (p >= 0.5) == happened
    error = 0.0
    for members in np.array_split(np.argsort(confidence, kind="stable"), min(bins, len(p))):
        error += len(members) / len(p) * abs(right[members].mean() - confidence[members].mean())
    return float(error)


def best_temperature(gap_N: ArrayLike) -> float | None:
    """The T > 0 that minimises the mean of -log σ(gap/T), for gaps of the chosen over the rejected answer.

    The mean is convex in 1/T, so its derivative is bisected. None if no finite T > 0 is a minimum.
    """
    gap = np.asarray(gap_N, np.float64)
    if not (gap < 0).any() or gap.mean() <= 0:
        return None
    unit = float(np.abs(gap).mean())

    def slope(log_inverse: float) -> float:
        scaled = np.exp(log_inverse) * gap / unit
        return -float(np.mean(gap * _sigmoid(-scaled)))

    low, high = -30.0, 30.0
    if slope(low) >= 0 or slope(high) <= 0:  # no finite temperature is best
        return None
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return float(unit / np.exp(low))


def spearman(x_M: ArrayLike, y_M: ArrayLike) -> float | None:
    """Rank correlation; equal values get their mean rank. None if one side is constant."""
    x, y = _ranks(np.asarray(x_M, np.float64)), _ranks(np.asarray(y_M, np.float64))
    x, y = x - x.mean(), y - y.mean()
    spread = float(np.sqrt((x @ x) * (y @ y)))
    return float(np.clip(x @ y / spread, -1, 1)) if spread > 0 else None


def _ranks(values: Floats) -> Floats:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    ranks: Floats = (np.cumsum(count) - (count - 1) / 2)[place]
    return ranks


def _sigmoid(x: Floats) -> Floats:
    value: Floats = np.exp(-np.logaddexp(0, -x))
    return value


def _nll(gap_N: Floats) -> float:
    return float(np.mean(np.logaddexp(0, -gap_N)))
