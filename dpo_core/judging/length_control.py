"""The win rate at equal lengths: what a judge would say if both answers were equally long.

Dubois et al. 2024 (arXiv 2404.04475; AlpacaEval 2) fit a logistic model of the preference

    logit p = θ + φ·tanh(Δlen / std(Δlen)) + ψ·difficulty

and report the mean of p with Δlen set to 0. Here without the difficulty of the instructions, which exists for
AlpacaEval's own 805 only, and without their rows of models that game the length; the rate is then σ(θ), and
it is not comparable with the leaderboard's. As there: no intercept beside θ, an L1 penalty (liblinear) chosen
by the log loss on held-out prompts, a preference of one half as two rows of half a weight.

The penalty draws the rate towards one half; where length and quality go together, some of the quality counts
as length.
"""

import warnings
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from dpo_core import stats
from dpo_core.stats import Estimate, Floats

FOLDS = 5
FEWEST = 25
"""Prompts below which there is no rate: resamples of so few are often separated by length, θ without end."""
_PENALTIES = np.logspace(-4, 4, 10)  # inverse strengths, scikit-learn's usual grid
# liblinear drops rows without weight, and gets the sign wrong when that leaves one class.
_NO_WEIGHT = 1e-9


def length_controlled(
    scores_N: ArrayLike, lengths_a_N: ArrayLike, lengths_b_N: ArrayLike,
    clusters: Sequence[Hashable] | None = None,
    *, resamples: int = 400, seed: int = 0, confidence: float = 0.95,
) -> Estimate | None:  # fmt: skip
    """The length-controlled win rate of a over b, with a percentile interval over resampled prompts.

    The penalty is chosen once, on all comparisons, and kept for the resamples. Exchanging a and b gives one
    minus the rate. Length does not explain a verdict that never varies: its rate and interval are `share`'s.

    Args:
        scores_N: 1 a wins, 0 b wins, between them a tie or a probability.
        lengths_a_N, lengths_b_N: characters of the answers.
        clusters: the prompt of each comparison; None: every one is its own.

    Returns:
        None where length cannot be told from quality: fewer than `FEWEST` prompts, or lengths that always
        differ by the same amount.
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
    strength = _strength(scores, longer, prompt_N)
    generator = np.random.default_rng(seed)
    rates = np.empty(resamples)
    for i in range(resamples):
        times = np.bincount(generator.integers(0, prompts, prompts), minlength=prompts)
        rates[i] = _rate(scores, longer, times[prompt_N].astype(np.float64), strength)
    tail = (1 - confidence) / 2
    low, high = np.quantile(rates, [tail, 1 - tail])
    value = _rate(scores, longer, np.ones_like(scores), strength)
    # A few resamples may all lie on one side of the value.
    return Estimate(value=value, low=min(low, value), high=max(high, value), n=prompts)


def fit(scores_N: Floats, tanh_N: Floats, weight_N: Floats, strength: float) -> tuple[float, float]:
    """θ and φ of logit p = θ + φ·x under an L1 penalty of inverse strength `strength`."""
    # Imported here: nothing else of the package needs scikit-learn, and it takes half a second.
    from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]

    features = np.column_stack([np.ones_like(tanh_N), tanh_N])
    wins = np.concatenate([np.ones_like(scores_N), np.zeros_like(scores_N)])
    soft = np.clip(np.concatenate([scores_N, 1 - scores_N]), _NO_WEIGHT, None)
    drawn = np.tile(weight_N > 0, 2)
    model = LogisticRegression(
        C=strength,
        l1_ratio=1,
        solver="liblinear",
        fit_intercept=False,
        tol=1e-8,
        max_iter=1000,
        random_state=0,
    )
    with warnings.catch_warnings():  # of a penalty so weak that the last digits still move
        warnings.filterwarnings("ignore", "Liblinear failed to converge")
        model.fit(np.tile(features, (2, 1))[drawn], wins[drawn], (soft * np.tile(weight_N, 2))[drawn])
    theta, phi = model.coef_[0]
    return float(theta), float(phi)


def scaled(longer_N: Floats, weight_N: Floats) -> Floats:
    """tanh(Δlen / std(Δlen)), the standard deviation over comparisons that count `weight_N` times."""
    total = weight_N.sum()
    mean = (weight_N * longer_N).sum() / total
    spread = float(np.sqrt((weight_N * (longer_N - mean) ** 2).sum() / (total - 1)))
    value: Floats = np.tanh(longer_N / spread) if spread > 0 else np.zeros_like(longer_N)
    return value


def _rate(scores_N: Floats, longer_N: Floats, weight_N: Floats, strength: float) -> float:
    theta, _ = fit(scores_N, scaled(longer_N, weight_N), weight_N, strength)
    return float(np.exp(-np.logaddexp(0, -theta)))


def _strength(scores_N: Floats, longer_N: Floats, prompt_N: np.ndarray) -> float:
    """The penalty whose fits give the smallest log loss on the prompts that they did not see."""
    every = np.ones_like(scores_N)
    tanh_N = scaled(longer_N, every)
    losses = np.zeros(len(_PENALTIES))
    for fold in range(FOLDS):
        unseen = prompt_N % FOLDS == fold
        for i, strength in enumerate(_PENALTIES):
            theta, phi = fit(scores_N, tanh_N, np.where(unseen, 0.0, every), strength)
            logit = theta + phi * tanh_N[unseen]
            right = scores_N[unseen]
            losses[i] += np.mean(right * np.logaddexp(0, -logit) + (1 - right) * np.logaddexp(0, logit))
    return float(_PENALTIES[int(np.argmin(losses))])
