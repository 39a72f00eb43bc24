"""Objectives on single completions that are labelled desirable or not.

Log-ratios h are SUMS over the completion (see `inputs.py`). The loss of a batch is the mean over the
EXAMPLES of the global batch, whatever the classes weigh.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from dpo_core.objectives.common import BETA, log_sigmoid
from dpo_core.objectives.inputs import UnpairedLogps, required
from dpo_core.objectives.parameter import Parameter
from dpo_core.objectives.registry import objective

if TYPE_CHECKING:
    from torch import Tensor


def z0(ratio_sum: "Tensor", examples: "Tensor | float") -> "Tensor":
    """KTO's reference point, 0-dim, detached: max(0, mean of h over MISMATCHED prompt-completion pairs).

    Each prompt gets the completion of another example. Sum and count are over all ranks; the mean is clamped
    last. A biased substitute for KL(π‖π_ref), not an estimate from the policy's own samples.

    TRL rotates completions within the batch of a rank when it prepares the data; here they come from the
    whole data set (`unpaired.mismatched`), so that a batch may have any size, order and split. On the same
    mismatched pairs the two are equal.
    """
    return (ratio_sum.detach() / examples).clamp(min=0)


def _kto_at_reference(parameters: Mapping[str, float]) -> float | None:
    desirable, undesirable = parameters["desirable_weight"], parameters["undesirable_weight"]
    # Otherwise it depends on how many of each class the batch has.
    return desirable / 2 if desirable == undesirable else None


@objective(
    citation="Ethayarajh, Xu, Muennighoff, Jurafsky, Kiela, KTO: Model Alignment as Prospect Theoretic "
    "Optimization, ICML 2024, arXiv 2402.01306",
    data="unpaired",
    parameters={
        "beta": BETA,
        "desirable_weight": Parameter(1.0, 0.01, 100.0, "the paper's λ_D"),
        "undesirable_weight": Parameter(1.0, 0.01, 100.0, "the paper's λ_U"),
    },
    value_at_reference=_kto_at_reference,
    caveat="z_0 couples the examples of a global batch: the loss depends on which share one, not on how it "
    "is split. Mismatched completions come from the data set; TRL takes them from the same rank's batch.",
)
def kto(logps: UnpairedLogps, *, beta: float, desirable_weight: float, undesirable_weight: float) -> "Tensor":
    """λ_D·(1 - σ(beta·(h - z_0))) if desirable, else λ_U·(1 - σ(beta·(z_0 - h))), of each example (B,).

    As in the paper, HALOs and TRL; z_0 is `logps.kl`. The authors advise weights with λ_D·n_D/(λ_U·n_U) in
    [1, 4/3]. The gradient vanishes for h far from z_0 on either side: robust to wrong labels, and blind
    to the worst examples.
    """
    above_B = beta * (logps.ratio_B - required(logps, "kl"))
    desirable_B = desirable_weight * (-above_B).sigmoid()
    return desirable_B.where(logps.desirable_B, undesirable_weight * above_B.sigmoid())


@objective(
    citation="Jung, Han, Nam, On, Binary Classifier Optimization for LLM Alignment, 2024, arXiv 2404.04656",
    data="unpaired",
    parameters={"beta": BETA},
    caveat="δ is a running mean over the batches so far: the loss depends on their order, not on how they "
    "are split. Without the paper's density-ratio weights of undesirable examples.",
)
def bco(logps: UnpairedLogps, *, beta: float) -> "Tensor":
    """-log σ(r - δ) if desirable, else -log σ(δ - r), of each example (B,), r = beta·h.

    δ is `logps.baseline`, in units of reward: the running mean of r over both classes, taken in before it is
    used and left alone in evaluation, as TRL's BCO trainer did (1.16 has none any more). Without the paper's
    density-ratio weights of undesirable examples, for prompts that differ between the classes; they were an
    option of that trainer. The default beta is that trainer's too; the paper trains with 0.01.
    """
    above_B = beta * logps.ratio_B - required(logps, "baseline")
    return -log_sigmoid(above_B.where(logps.desirable_B, -above_B))
