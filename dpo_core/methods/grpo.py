"""GRPO, its variants and RLOO: settings."""

from dataclasses import dataclass, replace
from typing import Literal

from pydantic import Field, model_validator

from dpo_core.methods.method import ROUNDS, Method
from dpo_core.methods.rounds import KlEstimator, RoundsConfig

Scale = Literal["group", "batch", "none"]
Level = Literal["token", "mean", "sum"]
Aggregate = Literal["sequence", "token", "constant"]


@dataclass(frozen=True)
class Rules:
    """What tells the variants apart."""

    baseline: Literal["group", "leave_one_out"]
    scale: Scale
    level: Level
    aggregate: Aggregate
    clip_low: float
    clip_high: float
    kl_coef: float
    kl_in: Literal["loss", "reward"]
    kl_estimator: KlEstimator
    dynamic_rounds: int = 0


_GRPO = Rules("group", "group", "token", "sequence", 0.2, 0.2, 0.04, "loss", "k3")
VARIANTS: dict[str, Rules] = {
    "grpo": _GRPO,
    "dr_grpo": replace(_GRPO, scale="none", aggregate="constant", kl_coef=0.0),
    "dapo": replace(_GRPO, aggregate="token", clip_high=0.28, kl_coef=0.0, dynamic_rounds=3),
    "gspo": replace(_GRPO, level="mean", clip_low=3e-4, clip_high=4e-4, kl_coef=0.0),
    "rloo": Rules("leave_one_out", "none", "sum", "sequence", 0.2, 0.2, 0.05, "reward", "k1"),
}
"""Each as its paper defines it; RLOO with the clip of TRL, which is idle on the first step of a round."""


class GrpoConfig(RoundsConfig):
    """A method with a group baseline. Fields that are empty take the variant's own value."""

    variant: Literal["grpo", "dr_grpo", "dapo", "gspo", "rloo"] = "grpo"
    """grpo (arXiv 2402.03300), dr_grpo (2503.20783), dapo (2503.14476), gspo (2507.18071) or rloo
    (2402.14740)."""
    group_size: int = Field(8, ge=2)
    """Completions of each prompt in a round."""
    epochs: int = Field(1, ge=1)
    """Passes over each round's episodes."""
    scale: Scale | None = None
    """What centred rewards are divided by: their group's standard deviation, the batch's, or nothing."""
    sample_std: bool = True
    """That deviation divides by G - 1 (TRL); false: by G."""
    level: Level | None = None
    """Whose ratio is clipped: each token's, the response's geometric mean, or the whole response's."""
    aggregate: Aggregate | None = None
    """How token losses become one: mean of response means, mean of tokens, sum over a constant."""
    clip_low: float | None = Field(None, gt=0, lt=1)
    """The ratio is clipped from below at 1 minus this."""
    clip_high: float | None = Field(None, gt=0)
    """And from above at 1 plus this."""
    kl_coef: float | None = Field(None, ge=0)
    """Weight of the KL to the reference."""
    kl_in: Literal["loss", "reward"] | None = None
    """loss: per token, with gradient, as GRPO has it; on the policy's own samples the gradient of k3 is that
    of the forward KL(reference‖policy). reward: subtracted from the score, as RLOO has it; its optimum is
    that of the reverse KL, which DPO and PPO have too."""
    kl_estimator: KlEstimator | None = None
    """Estimator of that KL."""
    dynamic_rounds: int | None = Field(None, ge=0)
    """DAPO's dynamic sampling: how often groups that all score the same are replaced by others."""
    mask_truncated: bool = False
    """DAPO's overlong filtering: completions that were cut teach nothing."""
    soft_overlong: int | None = Field(None, ge=1)
    """DAPO's soft punishment: over so many tokens before max_new_tokens the reward falls to one less."""

    @property
    def completions_per_prompt(self) -> int:
        return self.group_size

    @property
    def redraws(self) -> int:
        return self.rules.dynamic_rounds

    @property
    def rules(self) -> Rules:
        """The variant with what this config changes."""
        given = {name: getattr(self, name) for name in Rules.__dataclass_fields__ if hasattr(self, name)}
        return replace(VARIANTS[self.variant], **{k: v for k, v in given.items() if v is not None})

    @model_validator(mode="after")
    def _is_read(self) -> "GrpoConfig":
        leave_one_out = VARIANTS[self.variant].baseline == "leave_one_out"
        if leave_one_out and self.scale not in (None, "none"):
            raise ValueError("rloo's advantages are not scaled: leave scale out")
        if not self.sample_std and self.rules.scale != "group":
            raise ValueError("sample_std is read only where scale is group")
        if self.rules.level != "token" and self.rules.aggregate != "sequence":
            raise ValueError("one ratio for the whole response goes with aggregate sequence")
        return self


METHOD = Method(
    name="grpo",
    title="Group baselines: GRPO, Dr. GRPO, DAPO, GSPO, RLOO",
    citation="Shao et al. 2024, arXiv 2402.03300; each variant names its own paper",
    settings=GrpoConfig,
    data="prompts",
    curves=ROUNDS,
    version=2,
    scored=True,
    reference=lambda config: "live",
    total_steps=lambda config, rows: config.iterations,
)
