"""Settings of a training: optimiser, schedule, precision, memory, ranks, checkpoints and batches."""

import math
from typing import Literal

from pydantic import Field, model_validator

from dpo_core.config import Config


class OptimConfig(Config):
    """AdamW and its schedule."""

    learning_rate: float = Field(1e-6, gt=0, le=1)
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """After the warm-up: constant, or falling to zero at the last step."""
    warmup_fraction: float = Field(0.1, ge=0, lt=1)
    """Share of the steps over which the learning rate rises from zero."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of AdamW's two moments."""
    epsilon: float = Field(1e-8, gt=0)
    """AdamW's epsilon."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Clip the global gradient norm here; 0 never clips."""


class EngineConfig(Config):
    """Precision, ZeRO, ranks and checkpoints of a training."""

    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16: autocast over fp32 weights and an fp32 head; fp32 on processors without bf16 arithmetic (x86
    without AVX-512). fp32: everything in fp32."""
    zero_stage: int = Field(0, ge=0, le=3)
    """DeepSpeed ZeRO stage. 0 replicates everything and is the fastest in one process."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """What is kept in host memory: the optimiser's state (ZeRO 1-3), or the parameters too (ZeRO 3)."""
    processes: int = Field(1, ge=1)
    """Ranks on each node."""
    threads: int | None = Field(None, ge=1)
    """CPU threads of a rank; empty: its share of the cores."""
    compile: bool = False
    """Compile the decoder layers: faster after some minutes of compiling; needs a C++ compiler or a GPU."""
    gradient_checkpointing: bool = False
    """Recompute the layers in the backward pass: less memory, about a third more time."""
    save_every: int = Field(10, ge=1)
    """Steps between checkpoints."""
    keep_checkpoints: int = Field(2, ge=1)
    """Newest checkpoints to keep; with one, a damaged checkpoint cannot be replaced by an earlier one."""
    lost_after_seconds: float = Field(12.0, ge=1)
    """How long another rank's node may be silent on the network before the job ends: the node is gone or cut
    off. A slow rank is not silent, because its kernel answers."""
    timeout_seconds: float = Field(600.0, gt=0)
    """How long a rank waits in a step for the other live ranks; must be longer than the slowest
    checkpoint."""

    @model_validator(mode="after")
    def _offload_needs_shards(self) -> "EngineConfig":
        needed = {"none": 0, "optimizer": 1, "parameters": 3}[self.offload]
        if self.zero_stage < needed:
            raise ValueError(
                f"offload '{self.offload}' needs zero_stage {needed} or more, not {self.zero_stage}"
            )
        return self


class LoopConfig(Config):
    """Settings of a training on a fixed set of examples."""

    epochs: float = Field(1.0, gt=0)
    """Passes over the training examples."""
    max_steps: int | None = Field(None, ge=1)
    """Stop after this number of optimiser steps, whatever `epochs` is."""
    batch_size: int = Field(16, ge=1)
    """Examples (pairs, for preferences) in one optimiser step, over all ranks."""
    micro_batch_size: int = Field(8, ge=1)
    """Examples in one forward pass on one rank."""
    optim: OptimConfig = OptimConfig()
    """Optimiser and schedule."""
    engine: EngineConfig = EngineConfig()
    """Precision, ZeRO stage, ranks, checkpoints."""

    @model_validator(mode="after")
    def _batches_divide(self) -> "LoopConfig":
        share = self.micro_batch_size * self.engine.processes
        if self.rows_are_padded and self.batch_size % share:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size x processes = {share}"
            )
        return self

    @property
    def rows_are_padded(self) -> bool:
        """Whether the recipe asks for padded rows, `micro_batch_size` in a forward pass."""
        return True

    def padded_micro_batch_size(self, world: int) -> int:
        """Examples in a forward pass of padded rows on each of `world` ranks.

        For a model that cannot be packed although the recipe asks for packs, batch_size need not be a
        multiple of micro_batch_size.
        """
        if self.rows_are_padded:
            return self.micro_batch_size
        return math.gcd(self.batch_size // world, self.micro_batch_size)

    def steps(self, examples: int) -> int:
        """Optimiser steps for a number of examples."""
        steps = max(1, round(examples * self.epochs / self.batch_size))
        return min(steps, self.max_steps or steps)


class PackedLoopConfig(LoopConfig):
    """A training on prompts with completions, which can be packed."""

    pack_tokens: int | None = Field(4096, ge=64)
    """Tokens in one forward pass on one rank: each prompt once with its completions, without padding. Empty:
    padded rows of `micro_batch_size` examples, which is also used for a model that cannot be packed."""

    @property
    def rows_are_padded(self) -> bool:
        return self.pack_tokens is None
