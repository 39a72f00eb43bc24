"""Inputs of the objectives: log-probs of pairs, and of single labelled completions.

Notation, for every file of this package: w = chosen, l = rejected; log π(y|x) is SUMMED over the completion's
tokens, EOS included; h = log π(y|x) - log π_ref(y|x); D = h_w - h_l; u = beta·D. Shapes: B pairs or examples.
"""

from dataclasses import KW_ONLY, dataclass, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the recipe reads names and ranges from this package and should not wait for torch
    from torch import Tensor


@dataclass(frozen=True)
class Totals:
    """Counts over the GLOBAL batch, so that a mean over tokens is the same however the batch is split."""

    pairs: float
    chosen_tokens: float
    """Tokens of all chosen completions."""
    prompt_tokens: float
    """Prompt tokens that have a log-prob: all but the first of each prompt, counted once a pair."""


@dataclass(frozen=True)
class PairLogps:
    """Log-probs of both members of B pairs, each (B,), float32 or wider.

    The fields with a default are set only if the `extras` of the objective name them.

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
    """Number of tokens in the chosen sum."""
    rejected_tokens_B: "Tensor"

    _: KW_ONLY
    chosen_kl_B: "Tensor | None" = None
    """Extra "kl": K_w = Σ_t KL(π_ref(·|x, y_<t) ‖ π(·|x, y_<t)) over the chosen completion, with gradient."""
    rejected_kl_B: "Tensor | None" = None
    chosen_common_B: "Tensor | None" = None
    """Extra "common": the sum over the first min(n_w, n_l) tokens only."""
    rejected_common_B: "Tensor | None" = None
    ref_chosen_common_B: "Tensor | None" = None
    ref_rejected_common_B: "Tensor | None" = None
    prompt_B: "Tensor | None" = None
    """Extra "prompt": the policy's log-probs of the prompt's tokens, summed from its second token on."""
    prompt_tokens_B: "Tensor | None" = None
    """Number of tokens in the prompt sum: one less than in the prompt."""
    chosen_sharpness_B: "Tensor | None" = None
    """Extra "sharpness": mean over completion tokens of log π(y_t) - log Σ_v π(v)²; no gradient."""
    rejected_sharpness_B: "Tensor | None" = None
    totals: Totals | None = None
    """Counts of the global batch that has these pairs; None: these pairs are the global batch."""

    def __post_init__(self) -> None:
        _check_shapes(self, self.chosen_B)

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


@dataclass(frozen=True)
class UnpairedLogps:
    """Log-probs of B single completions, each labelled desirable or not; (B,), float32 or wider.

    `kl` and `baseline` couple the examples of a batch. The trainer computes them over all ranks, so that the
    loss of an example does not depend on how the batch is split.

    Raises:
        ValueError: the shapes differ, log-probs are narrower than float32, labels are not booleans, or
            `kl` or `baseline` is not a single number without gradient.
    """

    policy_B: "Tensor"
    """Sum over the completion's tokens, EOS included, under the policy."""
    ref_B: "Tensor"
    """The same under the reference."""
    tokens_B: "Tensor"
    """Number of tokens in the sums."""
    desirable_B: "Tensor"
    """Booleans."""
    kl: "Tensor | None" = None
    """KTO's z_0, 0-dim, from `z0`; never negative and without gradient."""
    baseline: "Tensor | None" = None
    """BCO's delta, 0-dim: the running mean of beta·h over all examples trained on, this batch included."""

    def __post_init__(self) -> None:
        _check_shapes(self, self.policy_B)
        if self.desirable_B.element_size() != 1 or self.desirable_B.is_floating_point():
            raise ValueError(f"desirable_B is {self.desirable_B.dtype}, not booleans")
        for name in ("kl", "baseline"):
            scalar = getattr(self, name)
            if scalar is not None and (scalar.ndim or scalar.requires_grad):
                raise ValueError(f"{name} must be one number (0-dim) without gradient")

    @property
    def ratio_B(self) -> "Tensor":
        """h: log π/π_ref of the completions."""
        return self.policy_B - self.ref_B


def required(logps: "PairLogps | UnpairedLogps", name: str) -> "Tensor":
    """The optional field `name`.

    Raises:
        ValueError: it was not computed.
    """
    value: Tensor | None = getattr(logps, name)
    if value is None:
        raise ValueError(f"{name} is missing; name it in the objective's `extras`")
    return value


def _check_shapes(logps: "PairLogps | UnpairedLogps", first: "Tensor") -> None:
    for field in fields(logps):
        if not field.name.endswith("_B") or (tensor := getattr(logps, field.name)) is None:
            continue
        if tensor.ndim != 1 or tensor.shape != first.shape:
            raise ValueError(f"{field.name} has shape {tuple(tensor.shape)}, not {tuple(first.shape)}")
        counts = "tokens" in field.name or field.name == "desirable_B"
        if not counts and tensor.dtype.itemsize < 4:
            raise ValueError(f"{field.name} is {tensor.dtype}; log-probs must be float32 or wider")
