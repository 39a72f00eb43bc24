"""How completions are sampled: settings and seeds, without the sampler itself."""

import hashlib
from typing import Literal

from pydantic import Field

from dpo_core.config import Config


class SamplingConfig(Config):
    """How completions are drawn. No top-k, no top-p: samples must come from the policy itself."""

    max_new_tokens: int = Field(24, ge=1)
    """Most tokens of a completion; a completion cut here does not end with end-of-sequence."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature. KL estimates need 1.0."""
    batch_size: int = Field(64, ge=1)
    """Completions drawn at once."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Weights while sampling. bf16 samples from a rounded policy, half again as fast on a CPU; log-probs are
    always computed anew from the fp32 weights."""


def seed_for(seed: int, *parts: object) -> int:
    """A 63-bit seed from a base seed and names, so that every batch has its own stream."""
    text = "\0".join(map(str, (seed, *parts)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
