"""Training a Bradley-Terry reward model on pairs."""

import json
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from dpo_core.data.tokens.tokenise import TokenPair
from dpo_core.errors import RecipeError
from dpo_core.methods.build import read_rows, start
from dpo_core.methods.estimate import Examples, Inputs, Work, loop
from dpo_core.methods.job import Job
from dpo_core.methods.method import GRADIENT, LOSS, Export, Method, Panel
from dpo_core.models.reward_model import RewardModel, bradley_terry_loss
from dpo_core.rewards.model import normalise_on, read_sizes, reward_of
from dpo_core.scoring import flops as cost
from dpo_core.scoring.attention import trunk_of
from dpo_core.scoring.document import Document
from dpo_core.training.config import EngineConfig, LoopConfig, OptimConfig
from dpo_core.training.engine import put_state
from dpo_core.training.loop import Trainer


class RewardModelConfig(LoopConfig):
    """The learned reward, for recipes without a known one."""

    centring: float = Field(0.01, ge=0)
    """Weight of (r_chosen + r_rejected)^2, which keeps rewards near zero."""
    margin: Literal["none", "agreement"] = "none"
    """agreement: the chosen answer must win by more where more of the votes were for it; a pair without votes
    asks for no margin."""
    margin_scale: float = Field(1.0, gt=0)
    """The margin is this times (2 * agreement - 1): nothing for a tie, all of it where everybody agreed."""
    optim: OptimConfig = OptimConfig(learning_rate=2e-5)
    """Optimiser and schedule; it ends at zero."""
    engine: EngineConfig = EngineConfig()
    """Precision, ZeRO stage, ranks, checkpoints."""

    @model_validator(mode="after")
    def _scale_is_read(self) -> "RewardModelConfig":
        if self.margin == "none" and self.margin_scale != 1.0:
            raise ValueError("margin_scale would not be read: margin is none")
        return self

    def margin_of(self, pair: TokenPair) -> float:
        """By how much the chosen answer's reward must be the larger one."""
        if self.margin == "none" or pair.agreement is None:
            return 0.0
        return self.margin_scale * (2 * pair.agreement - 1)


class RewardTrainer(Trainer[TokenPair]):
    """Mean over the pairs of the global batch of the Bradley-Terry loss."""

    module: RewardModel
    config: RewardModelConfig

    def __init__(
        self,
        module: RewardModel,
        examples: Seq[TokenPair],
        config: RewardModelConfig,
        *,
        seed: int,
        work: Path,
    ) -> None:
        if config.margin == "agreement" and all(e.agreement is None for e in examples):
            raise no_agreement()
        super().__init__(module, examples, config, seed=seed, work=work)

    def length(self, example: TokenPair) -> int:
        return max(len(example.chosen), len(example.rejected))

    def tokens(self, example: TokenPair) -> int:
        return len(example.chosen) + len(example.rejected)

    def weight(self, example: TokenPair) -> float:
        return 1.0

    def sizes(self, batch: Seq[TokenPair]) -> cost.Sizes:
        return read_sizes([s for e in batch for s in (e.chosen, e.rejected)])

    def losses(self, batch: Seq[TokenPair]) -> tuple[Tensor, dict[str, Tensor]]:
        sequences = [e.chosen for e in batch] + [e.rejected for e in batch]
        rewards_2B = reward_of(self.module, sequences, self.config.engine.precision)
        chosen_B, rejected_B = rewards_2B.chunk(2)
        margins_B = chosen_B.new_tensor([self.config.margin_of(e) for e in batch])
        losses_B = bradley_terry_loss(chosen_B, rejected_B, margins_B, self.config.centring)
        with torch.no_grad():
            metrics = {
                "rewards/chosen": chosen_B.sum(),
                "rewards/rejected": rejected_B.sum(),
                "rewards/margins": (chosen_B - rejected_B).sum(),
                "rewards/accuracies": (chosen_B > rejected_B).float().sum(),
            }
        return losses_B.sum(), metrics


def no_agreement() -> RecipeError:
    """What stops a margin by agreement on data of which no row knows any."""
    return RecipeError(
        "reward.model.margin is agreement, and no training pair says what share of the votes its label had",
        "Give the pairs a field agreement (0 to 1), or set reward.model.margin to none",
    )


def build(job: Job, config: RewardModelConfig) -> tuple[Any, Export]:
    """See `Method.build`."""
    model, tokenizer, tokenise = start(job, config)
    pairs, _ = tokenise.pairs(read_rows(job.data))
    reward_model = RewardModel(trunk_of(model), torch.Generator().manual_seed(job.seed))
    trainer = RewardTrainer(reward_model, pairs, config, seed=job.seed, work=Path(job.work))

    def export(state: dict[str, Tensor]) -> None:
        put_state(reward_model, state)
        facts = normalise_on(reward_model, pairs, config.engine.precision)
        reward_model.save(Path(job.out))
        tokenizer.save_pretrained(job.out)
        (Path(job.out) / "reward.json").write_text(json.dumps(facts))

    return trainer, export


def estimate(config: RewardModelConfig, inputs: Inputs) -> Work:
    """See `Method.estimate`. The whole answer is read and only its end is scored."""
    pairs = inputs.examples("pairs")
    ends = [Document(d.prompt + d.branches[0], tuple(b[-1:] for b in d.branches)) for d in pairs.documents]
    return loop(config, Examples(ends, pairs.count, pairs.note), inputs)


METHOD = Method(
    name="reward",
    title="Reward model",
    citation="Bradley and Terry 1952; Ouyang et al. 2022, arXiv 2203.02155, equation 1",
    settings=RewardModelConfig,
    data="pairs",
    build=build,
    estimate=estimate,
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
