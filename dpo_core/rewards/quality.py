"""How good a reward model is on pairs that it has not seen: accuracy, calibration, and its taste for length.

Shapes: N pairs, M numbers. The probabilities are those that the Bradley-Terry loss trains, p(A beats B) =
σ(r_A - r_B); a model whose rewards were rescaled afterwards is measured on the scale of the loss.
"""

import numpy as np
from numpy.typing import ArrayLike
from pydantic import Field

from dpo_core.config import Config
from dpo_core.statistics.estimates import Estimate, Floats, wilson

BINS = 10
_STEPS = 200  # halvings of the bracket of the temperature: far below the rounding of a float


class RewardQuality(Config):
    """What held-out pairs say about a reward model."""

    pairs: int = Field(ge=1)
    """Held-out pairs."""
    accuracy: Estimate
    """Share of pairs whose chosen answer has the larger reward (strict), Wilson interval."""
    ece: float
    """Expected calibration error over ten bins of equal size; biased upwards where there are few pairs."""
    brier: float
    """Mean squared error of the probabilities; 0.25 is what a coin gets."""
    nll: float
    """Mean negative log-likelihood in nats; ln 2 is what a coin gets."""
    temperature: float | None
    """What the gaps must be divided by to fit best: above 1 the model is too sure of itself. None where no
    finite one is best: every pair is ranked rightly, or the gaps tell nothing."""
    length_spearman: float | None
    """Rank correlation of the reward with the tokens of the completion; None where one does not vary."""
    gap_spearman: float | None
    """The same of the gaps of the pairs, each taken in both orders."""


def reward_quality(
    chosen_N: ArrayLike, rejected_N: ArrayLike, lengths_chosen_N: ArrayLike, lengths_rejected_N: ArrayLike,
    *, scale: float = 1.0, seed: int = 0,
) -> RewardQuality:  # fmt: skip
    """Measure rewards of held-out pairs.

    Args:
        chosen_N, rejected_N: rewards.
        lengths_chosen_N, lengths_rejected_N: tokens of the completions.
        scale: what the rewards were multiplied by after training (a reward model's `gain`).
        seed: of the order in which the two answers of a pair are shown to the calibration.

    Raises:
        StageFailed: there is no pair.
    """
    chosen, rejected = np.asarray(chosen_N, np.float64), np.asarray(rejected_N, np.float64)
    gap_N = (chosen - rejected) / scale
    accuracy = wilson(int((gap_N > 0).sum()), len(gap_N))
    # In a random order "A is better" is not always the truth, so that a tie is right half of the time.
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
        p_N: probabilities of the event; the confidence is max(p, 1 - p), in the likelier outcome.
        happened_N: whether it happened.
    """
    p, happened = np.asarray(p_N, np.float64), np.asarray(happened_N, bool)
    confidence, right = np.maximum(p, 1 - p), (p >= 0.5) == happened
    error = 0.0
    for members in np.array_split(np.argsort(confidence, kind="stable"), min(bins, len(p))):
        error += len(members) / len(p) * abs(right[members].mean() - confidence[members].mean())
    return float(error)


def best_temperature(gap_N: ArrayLike) -> float | None:
    """The T > 0 that minimises the mean of -log σ(gap/T), gaps of the chosen over the rejected answer.

    Convex in 1/T: the derivative is bisected. None where the minimum is at no finite T > 0.
    """
    gap = np.asarray(gap_N, np.float64)
    if not (gap < 0).any() or gap.mean() <= 0:
        return None
    unit = float(np.abs(gap).mean())

    def slope(log_inverse: float) -> float:
        scaled = np.exp(log_inverse) * gap / unit
        return -float(np.mean(gap * _sigmoid(-scaled)))

    low, high = -30.0, 30.0
    if slope(low) >= 0 or slope(high) <= 0:  # beyond what a temperature can mend
        return None
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return float(unit / np.exp(low))


def spearman(x_M: ArrayLike, y_M: ArrayLike) -> float | None:
    """Rank correlation, equal values sharing their mean rank; None where one side does not vary."""
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
