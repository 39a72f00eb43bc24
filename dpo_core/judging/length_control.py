"""Length-controlled win rate: an estimate of the win rate if both answers were equally long.

Dubois et al. 2024 (arXiv 2404.04475; AlpacaEval 2) fit a logistic model of the preference

    logit p = θ + φ·tanh(Δlen / std(Δlen)) + ψ·difficulty

and report the mean of p with Δlen set to 0. This version leaves out the difficulty of the instructions, which
is known only for AlpacaEval's own 805, and their rows of models that exploit length. The rate is then σ(θ)
and not comparable with the leaderboard. It also leaves out their L1 penalty, chosen by cross-validation: on
their 805 instructions it changes the rate by less than a point, but on a few dozen prompts it may set the
rate to exactly one half, with an interval that ignores the choice. A tie is half a win and half a loss.

If length and quality are correlated, part of the quality is attributed to length.

Shapes: N comparisons, R resamples of their prompts.
"""

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dpo_core.statistics import estimates as stats
from dpo_core.statistics.estimates import Estimate, Floats

FEWEST = 25
"""Minimum number of prompts: resamples of fewer are often separated by length, which makes θ infinite."""
# Ridge penalty on both coefficients; small against an information of about N/4, it only keeps θ of a
# separated resample finite.
_RIDGE = 1e-3


def length_controlled(
    scores_N: ArrayLike, lengths_a_N: ArrayLike, lengths_b_N: ArrayLike,
    clusters: Sequence[Hashable] | None = None,
    *, resamples: int = 400, seed: int = 0, confidence: float = 0.95,
) -> Estimate | None:  # fmt: skip
    """The length-controlled win rate of a over b, with a percentile interval over resampled prompts.

    Exchanging a and b gives one minus the rate. If all verdicts are equal, length cannot explain them, and
    rate and interval are those of `share`.

    Args:
        scores_N: 1 if a wins, 0 if b wins, between them for a tie or a probability.
        lengths_a_N, lengths_b_N: lengths of the answers in characters.
        clusters: the prompt of each comparison; None: each comparison has its own prompt.

    Returns:
        None if length cannot be separated from quality: there are fewer than `FEWEST` prompts, the lengths
        always differ by the same amount, or the lengths predict every verdict, in these comparisons or in
        more than one tail of the resamples.
    """
    scores = np.asarray(scores_N, np.float64)
    longer = np.asarray(lengths_a_N, np.float64) - np.asarray(lengths_b_N, np.float64)
    names = list(range(len(scores))) if clusters is None else list(clusters)
    place = {name: i for i, name in enumerate(dict.fromkeys(names))}
    prompt_N, prompts = np.asarray([place[name] for name in names], np.intp), len(place)
    if prompts < FEWEST or (np.ptp(longer) == 0 and longer[0] != 0):
        return None
    if np.ptp(scores) == 0:
        return stats.share(scores, names, confidence=confidence)
    generator = np.random.default_rng(seed)
    drawn_RP = generator.multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples)
    # The first row is the original comparisons.
    weight_RN = np.concatenate([np.ones((1, len(scores))), drawn_RP[:, prompt_N]])
    tail = (1 - confidence) / 2
    separated_R = _separated(scores, longer, weight_RN)
    if separated_R[0] or separated_R[1:].mean() > tail:
        return None
    theta_R, _ = fit(scores, scaled(longer, weight_RN), weight_RN)
    value, *rates = np.exp(-np.logaddexp(0, -theta_R))
    low, high = np.quantile(rates, [tail, 1 - tail])
    # A few resamples may all be on one side of the value.
    return Estimate(value=float(value), low=min(low, value), high=max(high, value), n=prompts)


def fit(scores_N: Floats, tanh_RN: Floats, weight_RN: Floats) -> tuple[Floats, Floats]:
    """Fit θ and φ (R,) of logit p = θ + φ·x by Newton's method; each row has its own x and weights."""
    theta_R, phi_R = np.zeros(len(tanh_RN)), np.zeros(len(tanh_RN))
    for _ in range(100):
        p_RN = np.exp(-np.logaddexp(0, -theta_R[:, None] - phi_R[:, None] * tanh_RN))
        error_RN, spread_RN = weight_RN * (scores_N - p_RN), weight_RN * p_RN * (1 - p_RN)
        slope, slope_x = error_RN.sum(1) - _RIDGE * theta_R, (error_RN * tanh_RN).sum(1) - _RIDGE * phi_R
        a, b = spread_RN.sum(1) + _RIDGE, (spread_RN * tanh_RN).sum(1)
        c = (spread_RN * tanh_RN**2).sum(1) + _RIDGE
        steps = np.stack([c * slope - b * slope_x, a * slope_x - b * slope]) / (a * c - b * b)
        steps = steps.clip(-2, 2)  # a full step may overshoot if nearly every p is 0 or 1
        theta_R, phi_R = theta_R + steps[0], phi_R + steps[1]
        if np.abs(steps).max() < 1e-10:
            break
    return theta_R, phi_R


def scaled(longer_N: Floats, weight_RN: Floats) -> Floats:
    """tanh(Δlen / std(Δlen)) (R,N), with the standard deviation of comparisons weighted by `weight_RN`."""
    total = weight_RN.sum(-1, keepdims=True)
    mean = (weight_RN * longer_N).sum(-1, keepdims=True) / total
    spread = np.sqrt((weight_RN * (longer_N - mean) ** 2).sum(-1, keepdims=True) / (total - 1))
    value: Floats = np.tanh(np.divide(longer_N, spread, out=np.zeros_like(weight_RN), where=spread > 0))
    return value


def _separated(scores_N: Floats, longer_N: Floats, weight_RN: Floats) -> NDArray[np.bool_]:
    """(R,): whether a threshold on the length difference separates wins from losses, which makes φ
    infinite."""

    def ends(member_N: NDArray[np.bool_]) -> tuple[Floats, Floats]:
        inside_RN = member_N & (weight_RN > 0)
        return (
            np.where(inside_RN, longer_N, np.inf).min(1),
            np.where(inside_RN, longer_N, -np.inf).max(1),
        )

    (low_won, high_won), (low_lost, high_lost) = ends(scores_N > 0), ends(scores_N < 1)
    parted = (high_lost <= low_won) | (high_won <= low_lost)
    # Length explains nothing if there is only one kind of verdict or if all lengths are equal.
    both = np.isfinite(low_won) & np.isfinite(low_lost)
    some_RN = (weight_RN > 0) & (longer_N != 0)
    value: NDArray[np.bool_] = parted & both & some_RN.any(1)
    return value
