"""Token-level DPO (TDPO1, TDPO2): the sequential forward KL of both completions enters the margin.

K = Σ_t KL(π_ref(·|x, y_<t) ‖ π(·|x, y_<t)) over the completion's positions and the WHOLE vocabulary. Cached
log-probs of the sampled tokens do not give it: the reference has to be live. Sums over tokens, never means.
"""

from typing import TYPE_CHECKING

from dpo_core.objectives.common import BETA, log_sigmoid
from dpo_core.objectives.inputs import PairLogps, required
from dpo_core.objectives.parameter import Parameter
from dpo_core.objectives.registry import objective

if TYPE_CHECKING:
    from torch import Tensor

_LIVE = (
    "Compares whole next-token distributions, which the cache of log-probs does not hold: the reference "
    "stays in memory beside the policy."
)
_TDPO = "Zeng et al., Token-level Direct Preference Optimization, ICML 2024, arXiv 2404.11999"


@objective(
    citation=_TDPO,
    parameters={"beta": BETA},
    extras={"kl"},
    caveat=_LIVE,
)
def tdpo1(logps: PairLogps, *, beta: float) -> "Tensor":
    """-log σ(beta·(D - (K_l - K_w))) of each pair (B,): TDPO1, gradients through both K.

    At the reference both K are at their minimum, 0, so value and gradient are DPO's. The authors advise it
    for low learning rates. `rewards/*` are beta·(h + K), as their repository logs.
    """
    difference_B = required(logps, "rejected_kl_B") - required(logps, "chosen_kl_B")
    return -log_sigmoid(beta * (logps.margin_B - difference_B))


@objective(
    citation=_TDPO,
    parameters={"beta": BETA, "alpha": Parameter(0.5, 0.0, 10.0, "weight of the difference of the KLs")},
    extras={"kl"},
    caveat=_LIVE,
)
def tdpo2(logps: PairLogps, *, beta: float, alpha: float) -> "Tensor":
    """-log σ(beta·(D - α·(K_l - sg[K_w]))) of each pair (B,): TDPO2; sg stops the gradient of K_w only.

    α is inside beta, as in the authors' code. α = 0 is DPO. The TDPO2 command in their repository runs TDPO1
    unless `if_tdpo2` is set; here they are two objectives.
    """
    difference_B = required(logps, "rejected_kl_B") - required(logps, "chosen_kl_B").detach()
    return -log_sigmoid(beta * (logps.margin_B - alpha * difference_B))
