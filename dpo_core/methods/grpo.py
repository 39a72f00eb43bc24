"""The method `grpo`: GRPO, its variants and RLOO; its settings, data and trainer."""

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
    """The rules in which the variants differ."""

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
"""Each as its paper defines it; RLOO with TRL's clip, which has no effect in the first step of a round."""


class GrpoConfig(RoundsConfig):
    """A method with a group baseline. Empty fields have the value of the variant."""

    variant: Literal["grpo", "dr_grpo", "dapo", "gspo", "rloo"] = "grpo"
    """grpo (arXiv 2402.03300), dr_grpo (2503.20783), dapo (2503.14476), gspo (2507.18071) or rloo
    (2402.14740)."""
    group_size: int = Field(8, ge=2)
    """Completions of each prompt in a round."""
    epochs: int = Field(1, ge=1)
    """Passes over each round's episodes."""
    scale: Scale | None = None
    """What centred rewards are divided by: the standard deviation of the group or the batch, or nothing."""
    sample_std: bool = True
    """The group's standard deviation divides by G - 1 (TRL); false: by G."""
    level: Level | None = None
    """Which ratio is clipped: each token's, the geometric mean over the response, or the response's."""
    aggregate: Aggregate | None = None
    """How token losses are combined: mean of the responses' means, mean over tokens, sum over a constant."""
    clip_low: float | None = Field(None, gt=0, lt=1)
    """The ratio is clipped from below at 1 minus this."""
    clip_high: float | None = Field(None, gt=0)
    """The ratio is clipped from above at 1 plus this."""
    kl_coef: float | None = Field(None, ge=0)
    """Weight of the KL to the reference."""
    kl_in: Literal["loss", "reward"] | None = None
    """loss: per token, with gradient, as in GRPO; on the policy's own samples the gradient of k3 is that of
    the forward KL(reference‖policy). reward: subtracted from the score, as in RLOO; its optimum is that of
    the reverse KL, as in DPO and PPO."""
    kl_estimator: KlEstimator | None = None
    """Estimator of that KL."""
    dynamic_rounds: int | None = Field(None, ge=0)
    """DAPO's dynamic sampling: how often groups whose scores are all equal are replaced by new ones."""
    mask_truncated: bool = False
    """DAPO's overlong filtering: truncated completions have no loss."""
    soft_overlong: int | None = Field(None, ge=1)
    """DAPO's soft overlong penalty: the reward falls by 1 over the last tokens before max_new_tokens, this
    many."""

    guidance: float = Field(1.0, ge=0, exclude_if=lambda weight: weight == 1)
    """Of a model of images: the guidance of its samples; see `sampling.guidance`. Needs `score`."""
    score: Literal["conditional", "guided"] | None = Field(None, exclude_if=lambda score: score is None)
    """With guidance, what is learnt from: the log-probs of the policy alone, from which the samples were then
    not drawn, or those of the guided distribution, through both of its parts."""

    @property
    def completions_per_prompt(self) -> int:
        return self.group_size

    @property
    def redraws(self) -> int:
        return self.rules.dynamic_rounds

    @property
    def rules(self) -> Rules:
        """The rules of the variant, with the fields that are set here."""
        fields = {name: getattr(self, name) for name in Rules.__dataclass_fields__ if hasattr(self, name)}
        return replace(VARIANTS[self.variant], **{k: v for k, v in fields.items() if v is not None})

    @model_validator(mode="after")
    def _is_read(self) -> "GrpoConfig":
        leave_one_out = VARIANTS[self.variant].baseline == "leave_one_out"
        if leave_one_out and self.scale not in (None, "none"):
            raise ValueError("scale has no effect, because rloo's advantages are not scaled. Remove it")
        if not self.sample_std and self.rules.scale != "group":
            raise ValueError(
                f"sample_std has no effect, because scale is {self.rules.scale}, not group. Remove it"
            )
        if self.rules.level != "token" and self.rules.aggregate != "sequence":
            raise ValueError(f"level {self.rules.level} needs aggregate sequence: a response has one ratio")
        if self.guidance != 1 and self.score is None:
            raise ValueError(
                "guidance needs score: guided learns from the distribution that is sampled, conditional from "
                "the policy's own, from which the samples are then not drawn"
            )
        if self.guidance == 1 and self.score is not None:
            raise ValueError("score has no effect, because guidance is 1. Remove it")
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
