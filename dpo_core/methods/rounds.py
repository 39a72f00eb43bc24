"""Settings shared by the methods that train on their own samples (PPO, GRPO, online DPO)."""

from typing import Literal

from pydantic import Field, model_validator

from dpo_core.config import Config
from dpo_core.training.config import EngineConfig, OptimConfig

KlEstimator = Literal["k1", "k2", "k3"]
"""Estimators of the KL to the reference; see `scoring.kl`."""


class RoundsConfig(Config):
    """Settings of a method that trains on its own samples."""

    iterations: int = Field(8, ge=1)
    """Rounds of sampling and updating."""
    episodes: int = Field(64, ge=2)
    """Completions sampled in each round, over all ranks: the large batch of Xu et al. (arXiv 2404.10719)."""
    epochs: int = Field(2, ge=1)
    """Passes over each round's episodes."""
    minibatches: int = Field(1, ge=1)
    """Optimiser steps in each pass; each pass assigns the episodes to them at random."""
    micro_batch_size: int = Field(16, ge=1)
    """Episodes in one forward pass on one rank; gradients are accumulated over a minibatch."""
    missing_eos_penalty: float | None = Field(None, ge=0)
    """Penalty for a completion that does not end; empty: none."""
    missing_eos: Literal["subtract", "replace"] = "subtract"
    """subtract the penalty from the score (TRL), or replace the score by minus the penalty (N+ details)."""
    score_clip: float | None = Field(None, gt=0)
    """Clip scores to plus or minus this value before they are learnt from; empty: no clipping."""
    reference_ema: float | None = Field(None, gt=0, le=1)
    """After each round the reference moves this share of the way to the policy (Xu et al.); empty: fixed."""
    optim: OptimConfig = OptimConfig(learning_rate=1e-5, epsilon=1e-5, warmup_fraction=0.0)
    """Optimiser and schedule of the policy."""
    engine: EngineConfig = EngineConfig(save_every=2)
    """Precision, ZeRO stage, ranks; `save_every` counts rounds."""

    @property
    def completions_per_prompt(self) -> int:
        """Completions of each prompt in a round."""
        return 1

    @property
    def redraws(self) -> int:
        """How often prompts whose samples all score the same are replaced by the next prompts."""
        return 0

    @property
    def length_rules(self) -> list[str]:
        """The fields that are set and judge how a completion ends: an image has no end, and one length."""
        names = ("missing_eos_penalty", "mask_truncated", "soft_overlong")
        return [name for name in names if getattr(self, name, None)]

    @model_validator(mode="after")
    def _rounds_divide(self) -> "RoundsConfig":
        if self.engine.zero_stage == 3:
            raise ValueError("a policy that ZeRO 3 shards cannot be sampled from: use zero_stage 0 to 2")
        for name in ("gradient_checkpointing", "compile"):
            if getattr(self.engine, name):
                raise ValueError(
                    f"engine.{name} has no effect, because training on own samples does not use it. Remove it"
                )
        if self.missing_eos == "replace" and self.missing_eos_penalty is None:
            raise ValueError(
                "missing_eos has no effect, because missing_eos_penalty is not set. Set that, or remove "
                "missing_eos"
            )
        shares = {
            "minibatches x micro_batch_size x processes": self.minibatches
            * self.micro_batch_size
            * self.engine.processes
        }
        if self.completions_per_prompt > 1:
            shares["completions per prompt x processes"] = self.completions_per_prompt * self.engine.processes
        for what, share in shares.items():
            if self.episodes % share:
                raise ValueError(f"episodes {self.episodes} is not a multiple of {what} = {share}")
        return self
