"""Objectives on pairs of summed completion log-probs.

Notation: w = chosen, l = rejected; h = log π(y|x) - log π_ref(y|x), summed over completion tokens and EOS;
D = h_w - h_l; u = beta·D. Shapes: B pairs. Each function returns the loss of each pair (B,), never a mean.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from dpo_core.objectives.registry import Parameter, objective

if TYPE_CHECKING:  # the recipe reads names and ranges from here and should not wait for torch
    from torch import Tensor


@dataclass(frozen=True)
class PairLogps:
    """Log-probs of both members of B pairs, each (B,), float32 or wider.

    Raises:
        ValueError: the shapes differ (they would broadcast to a wrong loss), or log-probs are narrower than
            float32 (a sum of hundreds of tokens in bfloat16 is off by whole nats).
    """

    chosen_B: "Tensor"
    """Sum over the chosen completion's tokens, EOS included, under the policy."""
    rejected_B: "Tensor"
    ref_chosen_B: "Tensor"
    """The same under the reference; zeros for an objective that needs none."""
    ref_rejected_B: "Tensor"
    chosen_tokens_B: "Tensor"
    """How many tokens the chosen sum runs over."""
    rejected_tokens_B: "Tensor"

    def __post_init__(self) -> None:
        for field in fields(self):
            tensor = getattr(self, field.name)
            if tensor.ndim != 1 or tensor.shape != self.chosen_B.shape:
                raise ValueError(
                    f"{field.name} has shape {tuple(tensor.shape)}, not {tuple(self.chosen_B.shape)}"
                )
            if "tokens" not in field.name and tensor.dtype.itemsize < 4:
                raise ValueError(f"{field.name} is {tensor.dtype}; log-probs must be float32 or wider")

    @property
    def chosen_ratio_B(self) -> "Tensor":
        """h_w: log π/π_ref of the chosen completions."""
        return self.chosen_B - self.ref_chosen_B

    @property
    def rejected_ratio_B(self) -> "Tensor":
        """h_l: log π/π_ref of the rejected completions."""
        return self.rejected_B - self.ref_rejected_B

    @property
    def margin_B(self) -> "Tensor":
        """D = h_w - h_l, before any beta."""
        return self.chosen_ratio_B - self.rejected_ratio_B


def log_sigmoid(x: "Tensor") -> "Tensor":
    """log σ(x) without overflow at either end; any shape."""
    from torch.nn import functional

    return functional.logsigmoid(x)


def pair_metrics(logps: PairLogps, beta: float) -> dict[str, "Tensor"]:
    """The field's standard per-pair numbers, each (B,), detached.

    `rewards/*` are the implicit rewards beta·h (nats times beta). Accuracy is strict: a tie counts 0, so that
    the accuracy at the reference is exactly 0. Names and definitions as in TRL and the original repository.
    """
    rewards_chosen_B = beta * logps.chosen_ratio_B.detach()
    rewards_rejected_B = beta * logps.rejected_ratio_B.detach()
    return {
        "rewards/chosen": rewards_chosen_B,
        "rewards/rejected": rewards_rejected_B,
        "rewards/margins": rewards_chosen_B - rewards_rejected_B,
        "rewards/accuracies": (rewards_chosen_B > rewards_rejected_B).to(rewards_chosen_B.dtype),
        "logps/chosen": logps.chosen_B.detach(),
        "logps/rejected": logps.rejected_B.detach(),
    }


BETA = Parameter(0.1, 0.001, 10.0, "strength of the pull to the reference; larger stays closer")
TAU = Parameter(0.1, 0.001, 10.0, "regularisation; the margin is drawn to 1/(2·tau)")


def _ln_2(_: Mapping[str, float]) -> float:
    return math.log(2)


def _ipo_at_reference(parameters: Mapping[str, float]) -> float:
    return 1 / (4 * parameters["tau"] ** 2)


@objective(
    "dpo",
    citation="Rafailov et al., Direct Preference Optimization, NeurIPS 2023, arXiv 2305.18290",
    data="pairs",
    parameters={"beta": BETA},
    value_at_reference=_ln_2,
)
def dpo(logps: PairLogps, *, beta: float) -> "Tensor":
    """-log σ(beta·D) of each pair (B,): Eq. 7 of the paper, its original form.

    Sums of token log-probs, no length normalisation. Gradient -beta·σ(-beta·D)·(∇log π(y_w) - ∇log π(y_l)).
    """
    return -log_sigmoid(beta * logps.margin_B)


@objective(
    "cdpo",
    citation="Mitchell, A note on DPO with noisy preferences and relationship to IPO, 2023",
    data="pairs",
    parameters={
        "beta": BETA,
        "label_smoothing": Parameter(0.1, 0.0, 0.5, "assumed share of pairs with flipped labels"),
    },
    value_at_reference=_ln_2,
)
def cdpo(logps: PairLogps, *, beta: float, label_smoothing: float) -> "Tensor":
    """-(1-ε)·log σ(u) - ε·log σ(-u) of each pair (B,), ε = label_smoothing.

    Conservative DPO as in the original DPO repository. The optimum is finite, u = log((1-ε)/ε), its value
    the entropy H(ε): over-confident pairs are pulled back. ε = 0 is DPO. TRL's `sigmoid` ignores ε.
    """
    u_B = beta * logps.margin_B
    return -(1 - label_smoothing) * log_sigmoid(u_B) - label_smoothing * log_sigmoid(-u_B)


@objective(
    "robust",
    citation="Chowdhury, Kini, Natarajan, Provably Robust DPO, ICML 2024, arXiv 2403.00409",
    data="pairs",
    parameters={
        "beta": BETA,
        # The loss divides by 1 - 2ε: one half carries no information and has no loss.
        "label_smoothing": Parameter(0.1, 0.0, 0.49, "known share of pairs with flipped labels"),
    },
    value_at_reference=_ln_2,
)
def robust(logps: PairLogps, *, beta: float, label_smoothing: float) -> "Tensor":
    """[-(1-ε)·log σ(u) + ε·log σ(-u)] / (1-2ε) of each pair (B,), ε = label_smoothing.

    Unbiased for the clean DPO loss when labels flip independently with rate ε. Note the PLUS before ε:
    unlike cDPO it has no minimum (slope -ε/(1-2ε) for large u), so values may be negative. As TRL `robust`.
    """
    u_B = beta * logps.margin_B
    kept_B, flipped_B = log_sigmoid(u_B), log_sigmoid(-u_B)
    return (-(1 - label_smoothing) * kept_B + label_smoothing * flipped_B) / (1 - 2 * label_smoothing)


_IPO = (
    "Azar et al., A General Theoretical Paradigm to Understand Learning from Human Preferences, AISTATS 2024"
)


@objective(
    "ipo_sum",
    citation=f"{_IPO}, arXiv 2310.12036",
    data="pairs",
    parameters={"tau": TAU},
    value_at_reference=_ipo_at_reference,
    reward_scale="tau",
)
def ipo_sum(logps: PairLogps, *, tau: float) -> "Tensor":
    """(D - 1/(2·tau))² of each pair (B,): Eq. 17, D from SUMS over tokens.

    The variant of the original DPO repository and OpenRLHF. A tau tuned here does not suit `ipo_mean`.
    """
    return (logps.margin_B - 1 / (2 * tau)) ** 2


@objective(
    "ipo_mean",
    citation=f"{_IPO}, arXiv 2310.12036",
    data="pairs",
    parameters={"tau": TAU},
    value_at_reference=_ipo_at_reference,
    reward_scale="tau",
)
def ipo_mean(logps: PairLogps, *, tau: float) -> "Tensor":
    """(h_w/n_w - h_l/n_l - 1/(2·tau))² of each pair (B,), n = completion tokens of that side.

    Eq. 17 on MEANS over tokens: the variant of TRL and HALOs. `rewards/*` of `pair_metrics` stay on sums.
    """
    chosen_B = logps.chosen_ratio_B / logps.chosen_tokens_B.clamp(min=1)
    rejected_B = logps.rejected_ratio_B / logps.rejected_tokens_B.clamp(min=1)
    return (chosen_B - rejected_B - 1 / (2 * tau)) ** 2


@objective(
    "hinge",
    citation="Zhao et al., SLiC-HF, 2023, arXiv 2305.10425; Liu et al., RSO, ICLR 2024, arXiv 2309.06657",
    data="pairs",
    parameters={"beta": BETA},
    value_at_reference=lambda _: 1.0,
)
def hinge(logps: PairLogps, *, beta: float) -> "Tensor":
    """max(0, 1 - beta·D) of each pair (B,): SLiC's hinge on the normalised likelihood, as RSO writes it.

    No gradient for a pair once beta·D >= 1. Same as TRL `hinge`.
    """
    return (1 - beta * logps.margin_B).relu()
