"""Parameters, values at the reference, and numerically stable functions shared by the objectives."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from dpo_core.objectives.inputs import PairLogps
from dpo_core.objectives.parameter import Parameter

if TYPE_CHECKING:
    from torch import Tensor

BETA = Parameter(0.1, 0.001, 10.0, "strength of the pull to the reference; larger stays closer")
SMOOTHING = Parameter(0.0, 0.0, 0.5, "assumed share of pairs with flipped labels")


def ln_2(_: Mapping[str, float]) -> float:
    """ln 2: the value of every -log σ(0)."""
    return math.log(2)


def log_sigmoid(x: "Tensor") -> "Tensor":
    """log σ(x) without overflow at either end; any shape."""
    from torch.nn import functional  # noqa: PLC0415 - objectives are declared without torch

    return functional.logsigmoid(x)


def smoothed(u: "Tensor", epsilon: float) -> "Tensor":
    """-(1-ε)·log σ(u) - ε·log σ(-u); any shape. With ε = 0 the second term has no gradient."""
    return -(1 - epsilon) * log_sigmoid(u) - epsilon * log_sigmoid(-u)


LARGEST_EXPONENT = 30.0
"""Beyond this, exponentials continue as their tangents: e^30 times any beta, and the sum of squares of such a
gradient, are far within float32."""


def bounded_expm1(x: "Tensor") -> "Tensor":
    """e^x - 1, beyond `LARGEST_EXPONENT` its tangent: a gradient that neither overflows nor vanishes."""
    beyond = (x - LARGEST_EXPONENT).relu()
    return x.clamp(max=LARGEST_EXPONENT).expm1() + math.exp(LARGEST_EXPONENT) * beyond


def bounded_exp(x: "Tensor") -> "Tensor":
    """e^x, continued as `bounded_expm1` is."""
    beyond = (x - LARGEST_EXPONENT).relu()
    return x.clamp(max=LARGEST_EXPONENT).exp() + math.exp(LARGEST_EXPONENT) * beyond


def log1mexp(x: "Tensor") -> "Tensor":
    """log(1 - e^x) for x < 0, exact at both ends: near 0 through expm1, far from it through log1p."""
    near = (-x.expm1()).log()
    far = (-x.exp()).log1p()
    return near.where(x > -math.log(2), far)


def token_means(logps: PairLogps) -> "tuple[Tensor, Tensor]":
    """log π(y_w)/n_w and log π(y_l)/n_l (B,), each over its own number of tokens, at least 1."""
    return (
        logps.chosen_B / logps.chosen_tokens_B.clamp(min=1),
        logps.rejected_B / logps.rejected_tokens_B.clamp(min=1),
    )


def ratio_means(logps: PairLogps) -> "tuple[Tensor, Tensor]":
    """h_w/n_w and h_l/n_l (B,), each over its own number of tokens, at least 1."""
    return (
        logps.chosen_ratio_B / logps.chosen_tokens_B.clamp(min=1),
        logps.rejected_ratio_B / logps.rejected_tokens_B.clamp(min=1),
    )


def chosen_nll(logps: PairLogps) -> "Tensor":
    """Each pair's part (B,) of the chosen completions' NLL per token: its mean is Σ-log π / Σ tokens.

    Every token of the global batch weighs the same, so a long completion weighs more than a short one.
    """
    totals = logps.totals
    if totals is None:
        return -logps.chosen_B * len(logps.chosen_B) / logps.chosen_tokens_B.sum().clamp(min=1)
    return -logps.chosen_B * totals.pairs / totals.chosen_tokens
