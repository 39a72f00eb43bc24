"""Estimators of KL(π‖π_ref) at sampled tokens (Schulman, "Approximating KL divergence"), in nats."""

from collections.abc import Callable

from torch import Tensor

from dpo_core.objectives.common import bounded_expm1


def k1(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """log π - log π_ref per token: unbiased for KL(π‖π_ref), may be negative. Any shape."""
    return logps - ref_logps


def k2(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """½(log π - log π_ref)² per token: biased, never negative; as a loss its gradient is that of the KL."""
    return 0.5 * (logps - ref_logps) ** 2


def k3(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """e^d - 1 - d with d = log π_ref - log π, per token: unbiased, never negative. Never apply it to sums.

    Beyond d = 30 the exponential continues as its tangent, so that gradients are finite before clipping.
    """
    d = ref_logps - logps
    return bounded_expm1(d) - d


KL_ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}
