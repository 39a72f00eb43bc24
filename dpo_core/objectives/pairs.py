"""DPO and its nearest relatives: functions of the margin D of summed log-ratios (see `inputs.py`).

Each function returns the loss of each pair (B,), never a mean.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from dpo_core.objectives.common import BETA, SMOOTHING, log_sigmoid, ratio_means, smoothed
from dpo_core.objectives.inputs import PairLogps
from dpo_core.objectives.parameter import Parameter
from dpo_core.objectives.registry import objective

if TYPE_CHECKING:
    from torch import Tensor

TAU = Parameter(0.1, 0.001, 10.0, "regularisation; the margin is drawn to 1/(2·tau)")


def _ipo_at_reference(parameters: Mapping[str, float]) -> float:
    return 1 / (4 * parameters["tau"] ** 2)


@objective(
    citation="Rafailov et al., Direct Preference Optimization, NeurIPS 2023, arXiv 2305.18290",
    parameters={"beta": BETA},
)
def dpo(logps: PairLogps, *, beta: float) -> "Tensor":
    """-log σ(beta·D) of each pair (B,): Eq. 7 of the paper, its original form.

    Sums of token log-probs, no length normalisation. Gradient -beta·σ(-beta·D)·(∇log π(y_w) - ∇log π(y_l)).
    """
    return -log_sigmoid(beta * logps.margin_B)


@objective(
    citation="Mitchell, A note on DPO with noisy preferences and relationship to IPO, 2023",
    parameters={"beta": BETA, "label_smoothing": SMOOTHING._replace(default=0.1)},
)
def cdpo(logps: PairLogps, *, beta: float, label_smoothing: float) -> "Tensor":
    """-(1-ε)·log σ(u) - ε·log σ(-u) of each pair (B,), ε = label_smoothing.

    Conservative DPO as in the original DPO repository. The optimum is finite, u = log((1-ε)/ε), its value
    the entropy H(ε): over-confident pairs are pulled back. ε = 0 is DPO. TRL's `sigmoid` ignores ε.
    """
    return smoothed(beta * logps.margin_B, label_smoothing)


@objective(
    citation="Chowdhury, Kini, Natarajan, Provably Robust DPO, ICML 2024, arXiv 2403.00409",
    parameters={
        "beta": BETA,
        # The loss divides by 1 - 2ε: one half carries no information and has no loss.
        "label_smoothing": Parameter(0.1, 0.0, 0.49, "known share of pairs with flipped labels"),
    },
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
    citation=f"{_IPO}, arXiv 2310.12036",
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
    citation=f"{_IPO}, arXiv 2310.12036",
    parameters={"tau": TAU},
    value_at_reference=_ipo_at_reference,
    reward_scale="tau",
)
def ipo_mean(logps: PairLogps, *, tau: float) -> "Tensor":
    """(h_w/n_w - h_l/n_l - 1/(2·tau))² of each pair (B,), n = completion tokens of that side.

    Eq. 17 on MEANS over tokens: the variant of TRL and HALOs. `rewards/*` of `pair_metrics` stay on sums.
    """
    chosen_B, rejected_B = ratio_means(logps)
    return (chosen_B - rejected_B - 1 / (2 * tau)) ** 2


@objective(
    citation="Zhao et al., SLiC-HF, 2023, arXiv 2305.10425; Liu et al., RSO, ICLR 2024, arXiv 2309.06657",
    parameters={"beta": BETA},
    value_at_reference=lambda _: 1.0,
)
def hinge(logps: PairLogps, *, beta: float) -> "Tensor":
    """max(0, 1 - beta·D) of each pair (B,): SLiC's hinge on the normalised likelihood, as RSO writes it.

    No gradient for a pair once beta·D >= 1. Same as TRL `hinge`.
    """
    return (1 - beta * logps.margin_B).relu()


@objective(
    citation="Lambert et al., Tülu 3: Pushing Frontiers in Open Language Model Post-Training, 2024, "
    "arXiv 2411.15124",
    parameters={"beta": Parameter(5.0, 0.001, 100.0, "strength of the pull to the reference, per token")},
)
def dpo_norm(logps: PairLogps, *, beta: float) -> "Tensor":
    """-log σ(beta·(h_w/n_w - h_l/n_l)) of each pair (B,): length-normalised DPO, on MEANS over tokens.

    TRL `sigmoid_norm`, open-instruct `dpo_norm` with its beta of 5. `rewards/*` stay on sums, as in TRL.
    """
    chosen_B, rejected_B = ratio_means(logps)
    return -log_sigmoid(beta * (chosen_B - rejected_B))


def _exo_at_reference(parameters: Mapping[str, float]) -> float:
    epsilon = parameters["label_smoothing"]
    return -math.log(2) - math.log(epsilon * (1 - epsilon)) / 2


@objective(
    citation="Ji et al., Towards Efficient Exact Optimization of Language Model Alignment, ICML 2024, "
    "arXiv 2402.00856",
    parameters={
        "beta": BETA,
        # The target must leave both sides some probability: its logarithm is taken.
        "label_smoothing": Parameter(1e-3, 1e-6, 0.5, "probability that the target gives the rejected side"),
    },
    value_at_reference=_exo_at_reference,
)
def exo(logps: PairLogps, *, beta: float, label_smoothing: float) -> "Tensor":
    """KL([σ(u), σ(-u)] ‖ [1-ε, ε]) of each pair (B,), ε = label_smoothing: EXO on pairs, TRL `exo_pair`.

    σ(u)·(log σ(u) - log(1-ε)) + σ(-u)·(log σ(-u) - log ε). Zero at u = log((1-ε)/ε). The KL has the
    policy first and the labels second, the other way round than in cDPO.
    """
    u_B = beta * logps.margin_B
    chosen_B = u_B.sigmoid() * (log_sigmoid(u_B) - math.log(1 - label_smoothing))
    return chosen_B + (-u_B).sigmoid() * (log_sigmoid(-u_B) - math.log(label_smoothing))


@objective(
    citation="Lu et al., Discovering Preference Optimization Algorithms with and for Large Language Models, "
    "NeurIPS 2024, arXiv 2406.08414",
    parameters={
        "beta": BETA,
        "temperature": Parameter(0.05, 0.001, 0.99, "the paper's τ: how sharply the two losses are blended"),
    },
    value_at_reference=lambda _: (math.log(2) + 1) / 2,
)
def discopop(logps: PairLogps, *, beta: float, temperature: float) -> "Tensor":
    """-(1-m)·log σ(u) + m·exp(-u) of each pair (B,), m = σ(u/τ), τ = temperature: log-ratio modulated loss.

    TRL `discopop`, the loss that the authors' search found. Not convex. m·exp(-u) is computed through its
    logarithm, so that it tends to 0 for u -> -∞ instead of 0·∞; that takes τ < 1.
    """
    u_B = beta * logps.margin_B
    exponential_B = (log_sigmoid(u_B / temperature) - u_B).exp()
    return -(-u_B / temperature).sigmoid() * log_sigmoid(u_B) + exponential_B
