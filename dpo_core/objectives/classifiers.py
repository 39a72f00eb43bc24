"""Objectives on pairs that score each side separately, not only the margin.

Log-ratios h are SUMS over the completion (see `inputs.py`). Definitions as in TRL's DPO trainer.
"""

import math
from typing import TYPE_CHECKING

from dpo_core.objectives.common import BETA, log_sigmoid
from dpo_core.objectives.inputs import PairLogps
from dpo_core.objectives.registry import objective

if TYPE_CHECKING:
    from torch import Tensor


@objective(
    citation="Chen, He, Yuan, Cui, Su, Zhu, Noise Contrastive Alignment of Language Models with Explicit "
    "Rewards, NeurIPS 2024, arXiv 2402.05369",
    parameters={"beta": BETA},
    value_at_reference=lambda _: 2 * math.log(2),
)
def nca(logps: PairLogps, *, beta: float) -> "Tensor":
    """-log σ(beta·h_w) - ½·log σ(-beta·h_w) - ½·log σ(-beta·h_l) of each pair (B,).

    NCA for two completions of one prompt, TRL `nca_pair`. The optimum of the chosen side alone is at
    σ(beta·h_w) = 2/3, so its likelihood does not fall as it can if only the margin counts.
    """
    chosen_B, rejected_B = beta * logps.chosen_ratio_B, beta * logps.rejected_ratio_B
    return -log_sigmoid(chosen_B) - 0.5 * log_sigmoid(-chosen_B) - 0.5 * log_sigmoid(-rejected_B)


@objective(
    citation="Jung, Han, Nam, On, Binary Classifier Optimization for LLM Alignment, 2024, arXiv 2404.04656",
    parameters={"beta": BETA},
    value_at_reference=lambda _: 2 * math.log(2),
    caveat="Without the paper's running shift delta, which `bco` has.",
)
def bco_pair(logps: PairLogps, *, beta: float) -> "Tensor":
    """-log σ(beta·h_w) - log σ(-beta·h_l) of each pair (B,): TRL `bco_pair`.

    BCO on pairs WITHOUT the running shift delta of the paper; `bco` has it. This is TRL's code; its
    documentation has DPO's formula for this loss. The quality term of MPO.
    """
    return -log_sigmoid(beta * logps.chosen_ratio_B) - log_sigmoid(-beta * logps.rejected_ratio_B)


@objective(
    citation="Wu, Sun, Yuan, Ji, Yang, Gu, Self-Play Preference Optimization for Language Model Alignment, "
    "2024, arXiv 2405.00675",
    parameters={"beta": BETA},
    value_at_reference=lambda parameters: 1 / (2 * parameters["beta"] ** 2),
)
def sppo_hard(logps: PairLogps, *, beta: float) -> "Tensor":
    """(h_w - 1/(2·beta))² + (h_l + 1/(2·beta))² of each pair (B,): TRL `sppo_hard`.

    SPPO's squared loss with win probabilities 1 and 0 in place of estimated ones. Each side moves to its own
    target, ±1/(2·beta); past it the gradient changes sign.
    """
    target = 1 / (2 * beta)
    return (logps.chosen_ratio_B - target) ** 2 + (logps.rejected_ratio_B + target) ** 2


_APO = (
    "D'Oosterlinck et al., Anchored Preference Optimization and Contrastive Revisions, 2024, arXiv 2408.06266"
)


@objective(citation=_APO, parameters={"beta": BETA}, value_at_reference=lambda _: 1.0)
def apo_zero(logps: PairLogps, *, beta: float) -> "Tensor":
    """(1 - σ(beta·h_w)) + σ(beta·h_l) of each pair (B,), in [0, 2]: APO-zero, TRL `apo_zero`.

    Raises the chosen and lowers the rejected side, each until it saturates: for data better than the model.
    """
    return (-beta * logps.chosen_ratio_B).sigmoid() + (beta * logps.rejected_ratio_B).sigmoid()


@objective(citation=_APO, parameters={"beta": BETA}, value_at_reference=lambda _: 1.0)
def apo_down(logps: PairLogps, *, beta: float) -> "Tensor":
    """σ(beta·h_w) + (1 - σ(beta·D)) of each pair (B,), in [0, 2]: APO-down, TRL `apo_down`.

    LOWERS both sides, the rejected one faster: for a model that is better than the data.
    """
    return (beta * logps.chosen_ratio_B).sigmoid() + (-beta * logps.margin_B).sigmoid()
