"""The Bradley-Terry reward model: its settings, data and trainer."""

from typing import Literal

from pydantic import Field, model_validator

from dpo_core.errors import RecipeError
from dpo_core.methods.method import GRADIENT, LOSS, Method, Panel
from dpo_core.training.config import EngineConfig, LoopConfig, OptimConfig


class RewardModelConfig(LoopConfig):
    """The reward model, for recipes without a known reward."""

    centring: float = Field(0.01, ge=0)
    """Weight of (r_chosen + r_rejected)^2, which keeps rewards near zero."""
    margin: Literal["none", "agreement"] = "none"
    """agreement: the margin grows with the share of votes for the chosen answer; a pair without votes has
    none."""
    margin_scale: float = Field(1.0, gt=0)
    """The margin is this times (2 * agreement - 1): 0 for a tie, this value if all votes agree."""
    optim: OptimConfig = OptimConfig(learning_rate=2e-5)
    """Optimiser and schedule."""
    engine: EngineConfig = EngineConfig()
    """Precision, ZeRO stage, ranks, checkpoints."""

    @model_validator(mode="after")
    def _scale_is_read(self) -> "RewardModelConfig":
        if self.margin == "none" and self.margin_scale != 1.0:
            raise ValueError(
                "margin_scale has no effect, because margin is none. Set margin to agreement, or remove "
                "margin_scale"
            )
        return self

    def margin_of(self, agreement: float | None) -> float:
        """The margin by which the reward of a pair's chosen answer should exceed the rejected one's."""
        if self.margin == "none" or agreement is None:
            return 0.0
        return self.margin_scale * (2 * agreement - 1)


def no_agreement() -> RecipeError:
    """The error for a margin by agreement on data without agreement."""
    return RecipeError(
        "reward.model.margin is agreement, but no training pair has a value of agreement",
        "Add the field agreement (0 to 1) to the pairs, or set reward.model.margin to none",
    )


METHOD = Method(
    name="reward",
    title="Reward model",
    citation="Bradley and Terry 1952; Ouyang et al. 2022, arXiv 2203.02155, equation 1",
    settings=RewardModelConfig,
    data="pairs",
    curves=(
        LOSS,
        Panel("Rewards", "reward", (("rewards/chosen", "chosen"), ("rewards/rejected", "rejected")), 0.0),
        Panel("Reward margin", "reward", (("rewards/margins", "margin"),), 0.0),
        Panel("Preference accuracy", "share of pairs", (("rewards/accuracies", "accuracy"),), 0.5),
        GRADIENT,
    ),
    version=2,
    policy=False,
    artifact="reward-model",
)
