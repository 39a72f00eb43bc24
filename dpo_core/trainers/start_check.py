"""Checks before the first step that a policy which is its own reference has log-ratios of zero."""

from torch import Tensor

from dpo_core.errors import StageFailed

# How much the log-prob of about 50 tokens may differ between two batch shapes, in nats.
_TOLERANCE = {"fp32": 1e-3, "bf16": 0.5}


def require_reference_values(gaps_B: Tensor, precision: str) -> None:
    """Check that log π/π_ref (B,) is zero.

    Raises:
        StageFailed: it is not, so the cached log-probs are not those of this model.
    """
    gap, allowed = float(gaps_B.abs().max()), _TOLERANCE[precision]
    if not gap <= allowed:  # also refuses NaN
        raise StageFailed(
            f"before the first step policy and reference differ by {gap:.3g} nats "
            f"(allowed {allowed}), so the reference log-probs are not those of this model",
            "Remove the folder cache-reference in store/index of the workspace, then resume the run; if the "
            "error repeats, the attention or the precision of policy and reference differs",
        )
