"""Alignment by optimal transport: distributions of log-ratios are compared, not single pairs.

Both objectives sort over the batch, so a batch has to be one forward pass: split into micro-batches it has
another order and another loss. An entry of the result belongs to a place in the sorted order, not to a pair;
only the mean has a meaning. Log-probs are SUMS over the completion.
"""

from typing import TYPE_CHECKING

from dpo_core.objectives.common import BETA, SMOOTHING, smoothed
from dpo_core.objectives.inputs import PairLogps
from dpo_core.objectives.registry import objective

if TYPE_CHECKING:
    from torch import Tensor

_SORTS = (
    "Sorts over the batch, so that the loss depends on which pairs share one: the global batch has to be one "
    "forward pass in one process."
)
_AOT = (
    "Melnyk et al., Distributional Preference Alignment of LLMs via Optimal Transport, NeurIPS 2024, "
    "arXiv 2406.05882"
)


@objective(
    citation=_AOT,
    parameters={"beta": BETA, "label_smoothing": SMOOTHING},
    batch_coupled=True,
    caveat=_SORTS,
)
def aot(logps: PairLogps, *, beta: float, label_smoothing: float) -> "Tensor":
    """cDPO's loss of u = beta·(sort(log π(y_w)/π(y_l)) - sort(log π_ref(y_w)/π_ref(y_l))) at each rank (B,).

    Paired AOT as TRL `aot`: the policy's margins shall dominate the reference's in first order.
    """
    policy_B = (logps.chosen_B - logps.rejected_B).sort().values
    reference_B = (logps.ref_chosen_B - logps.ref_rejected_B).sort().values
    return smoothed(beta * (policy_B - reference_B), label_smoothing)


@objective(
    citation=_AOT,
    parameters={"beta": BETA, "label_smoothing": SMOOTHING},
    batch_coupled=True,
    caveat=_SORTS,
)
def aot_unpaired(logps: PairLogps, *, beta: float, label_smoothing: float) -> "Tensor":
    """cDPO's loss of u = beta·(sort(h_w) - sort(h_l)) at each rank (B,): TRL `aot_unpaired`.

    Which chosen answer belongs to which rejected one is not used, though the data are pairs.
    """
    margin_B = logps.chosen_ratio_B.sort().values - logps.rejected_ratio_B.sort().values
    return smoothed(beta * margin_B, label_smoothing)
