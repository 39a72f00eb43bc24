"""Settings and seeds of sampling."""

import hashlib
from typing import Literal

from pydantic import Field

from dpo_core.config import Config


class SamplingConfig(Config):
    """How completions are drawn. No top-k and no top-p: samples must come from the policy itself."""

    max_new_tokens: int = Field(24, ge=1)
    """Maximum tokens of a completion; one that is truncated here has no end-of-sequence token."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature. KL estimates need 1.0."""
    batch_size: int = Field(64, ge=1)
    """Completions drawn at once."""
    guidance: float = Field(1.0, ge=0, exclude_if=lambda weight: weight == 1)
    """Of a model of images: its logits are ℓ_u + w(ℓ_c - ℓ_u), of the prompt (c) and of one that says nothing
    (u). 1 samples from the policy itself."""
    denoising_steps: int = Field(20, ge=1, exclude_if=lambda steps: steps == 20)
    """Of a diffusion model: its steps for an image. It reads this, `guidance` and `batch_size` alone."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Precision of the weights while sampling. bf16 samples from a rounded policy and is about 1.5 times as
    fast on a CPU; log-probs are always recomputed with the fp32 weights."""


def seed_for(seed: int, *parts: object) -> int:
    """A 63-bit seed derived from a base seed and names."""
    text = "\0".join(map(str, (seed, *parts)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
