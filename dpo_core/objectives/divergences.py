"""Other divergences than reverse KL: the score s(h) replaces the log-ratio h in DPO's logistic loss.

Log-ratios are SUMS over the completion (see `inputs.py`). `rewards/*` stay beta·h, as in TRL.
"""

from typing import TYPE_CHECKING

from dpo_core.objectives.common import BETA, bounded_exp, bounded_expm1, log_sigmoid
from dpo_core.objectives.inputs import PairLogps
from dpo_core.objectives.parameter import Parameter
from dpo_core.objectives.registry import objective

if TYPE_CHECKING:
    from torch import Tensor

# e^20 times the smallest beta is far beyond the reach of the logistic; larger log-ratios add h, not e^h.
_LARGEST_CHI_RATIO = 20.0

_F_DPO = (
    "Wang, Jiang, Yang, Liu, Chen, Beyond Reverse KL: Generalizing DPO with Diverse Divergence Constraints, "
    "ICLR 2024, arXiv 2309.16240"
)


@objective(
    citation=_F_DPO,
    parameters={"beta": BETA},
)
def fdpo_forward_kl(logps: PairLogps, *, beta: float) -> "Tensor":
    """-log σ(beta·(s_w - s_l)) of each pair (B,), s = -exp(-h): f-DPO with the forward KL.

    As TRL `forward_kl`, whose 1 in 1 - exp(-h) cancels. The slope at the reference is DPO's. Gradients grow
    as exp(-h); of a completion that lost more than 30 nats the exponential continues as its tangent (in TRL
    it overflows), so that the norm of the gradient is finite and can be clipped.
    """
    chosen_B, rejected_B = -bounded_exp(-logps.chosen_ratio_B), -bounded_exp(-logps.rejected_ratio_B)
    return -log_sigmoid(beta * (chosen_B - rejected_B))


@objective(
    citation=_F_DPO,
    parameters={"beta": BETA},
)
def fdpo_js(logps: PairLogps, *, beta: float) -> "Tensor":
    """-log σ(beta·(s_w - s_l)) of each pair (B,), s = log σ(h): f-DPO with the Jensen-Shannon divergence.

    As TRL `js_divergence`. s saturates at 0, so raising h_w has a bounded value. The gradient at the
    reference is half of DPO's.
    """
    chosen_B, rejected_B = log_sigmoid(logps.chosen_ratio_B), log_sigmoid(logps.rejected_ratio_B)
    return -log_sigmoid(beta * (chosen_B - rejected_B))


@objective(
    citation=_F_DPO,
    parameters={
        "beta": BETA,
        # Beyond 1 the derivative f' is finite at 0 and the paper's derivation no longer holds.
        "alpha": Parameter(0.5, 0.0, 1.0, "0 is the forward KL, 1 the reverse KL (DPO)"),
    },
)
def fdpo_alpha(logps: PairLogps, *, beta: float, alpha: float) -> "Tensor":
    """-log σ(beta·(s_w - s_l)) of each pair (B,), s = (exp((α-1)·h) - 1)/(α-1): f-DPO's α-divergence.

    As TRL `alpha_divergence`. The -1 cancels in the difference, but keeps precision as α nears 1, where
    s = h. Exponentials continue as tangents beyond 30, as in `fdpo_forward_kl`; TRL clips them at 80.
    """

    def score(ratio_B: "Tensor") -> "Tensor":
        if alpha == 1:
            return ratio_B
        return bounded_expm1((alpha - 1) * ratio_B) / (alpha - 1)

    return -log_sigmoid(beta * (score(logps.chosen_ratio_B) - score(logps.rejected_ratio_B)))


def _kl_plus_chi(ratio_B: "Tensor", c: float) -> "Tensor":
    """h + c·(e^h - 1): the slope f'(e^h) of KL + (c/2)·χ². h is cut inside the exponential only."""
    return ratio_B + c * ratio_B.clamp(max=_LARGEST_CHI_RATIO).expm1()


@objective(
    citation="Huang, Zhan, Xie, Lee, Sun, Krishnamurthy, Foster, Correcting the Mythos of KL-Regularization: "
    "Direct Alignment without Overoptimization via Chi-Squared Preference Optimization, ICLR 2025, "
    "arXiv 2407.13399",
    parameters={
        "beta": BETA,
        "r_max": Parameter(10.0, 0.1, 1000.0, "largest reward of a completion; the margin stops at twice it"),
    },
    caveat="The clip at ±2·r_max was not checked against the paper's text.",
)
def chi_po(logps: PairLogps, *, beta: float, r_max: float) -> "Tensor":
    """-log σ(clip(beta·(φ_w - φ_l), ±2·r_max)) of each pair (B,), φ = exp(h) + h: the paper's χPO.

    The link φ comes from mixing the χ² divergence with KL. The gradient at the reference is twice DPO's. A
    pair whose margin is clipped, on either side, has no gradient. h is cut at 20 inside the exponential
    only. Not XPO, which is online DPO with an exploration bonus.
    """
    chosen_B, rejected_B = _kl_plus_chi(logps.chosen_ratio_B, 1.0), _kl_plus_chi(logps.rejected_ratio_B, 1.0)
    return -log_sigmoid((beta * (chosen_B - rejected_B)).clamp(-2 * r_max, 2 * r_max))


@objective(
    citation="This project's reading of a high-order KL regulariser for diffusion (xDPO, Electronics "
    "14(15):2939, 2025, whose loss is not public); the link is that of Huang et al., arXiv 2407.13399",
    parameters={
        "beta": BETA,
        "c": Parameter(0.5, 0.0, 100.0, "weight of the term of second order; 0 is DPO, 1 χPO without clip"),
    },
    caveat="This project's reading of xDPO, not its loss, which the authors have not published.",
)
def kl_plus(logps: PairLogps, *, beta: float, c: float) -> "Tensor":
    """-log σ(beta·(φ_w - φ_l)) of each pair (B,), φ = h + c·(e^h - 1): DPO under KL + (c/2)·χ².

    At the optimum beta·φ is the reward up to a constant, so an answer that gained much costs more than under
    the KL alone. The gradient at the reference is 1 + c times DPO's. h is cut at 20 inside the exponential.
    """
    chosen_B, rejected_B = _kl_plus_chi(logps.chosen_ratio_B, c), _kl_plus_chi(logps.rejected_ratio_B, c)
    return -log_sigmoid(beta * (chosen_B - rejected_B))
