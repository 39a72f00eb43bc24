"""The check before the first step: a policy that is its own reference has log-ratios of zero."""

from torch import Tensor

from dpo_core.errors import StageFailed

# How far a log-prob of about 50 tokens may move between two batch shapes, in nats.
_TOLERANCE = {"fp32": 1e-3, "bf16": 0.5}


def require_reference_values(gaps_B: Tensor, precision: str) -> None:
    """Refuse to start where log π/π_ref (B,) of a policy that is its own reference differs from zero.

    Raises:
        StageFailed: the cached log-probs are not those of this model.
    """
    gap, allowed = float(gaps_B.abs().max()), _TOLERANCE[precision]
    if not gap <= allowed:  # also refuses NaN
        raise StageFailed(
            f"before the first step policy and reference differ by {gap:.3g} nats "
            f"(allowed {allowed}), so the reference log-probs are not those of this model",
            "Run the cache stage again; if it repeats, the attention or precision of the two differ",
        )
