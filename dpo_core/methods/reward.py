"""Training a Bradley-Terry reward model on pairs, and scoring with it."""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from dpo_core.data.tokens.tokenise import Sequence, TokenPair
from dpo_core.errors import RecipeError
from dpo_core.models.reward_model import RewardModel, bradley_terry_loss
from dpo_core.scoring import flops as cost
from dpo_core.scoring.layout import right_padded
from dpo_core.scoring.logprobs import autocast, length_batches
from dpo_core.training.config import EngineConfig, OptimConfig
from dpo_core.training.loop import LoopConfig, Trainer


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


def read_sizes(sequences: Seq[Sequence]) -> cost.Sizes:
    """What `reward_of` computes, from lengths alone; the head reads one position of each."""
    return cost.padded_sizes([len(s) for s in sequences], len(sequences))


def no_agreement() -> RecipeError:
    """What stops a margin by agreement on data of which no row knows any."""
    return RecipeError(
        "reward.model.margin is agreement, and no training pair says what share of the votes its label had",
        "Give the pairs a field agreement (0 to 1), or set reward.model.margin to none",
    )


def reward_of(model: RewardModel, sequences: Seq[Sequence], precision: str) -> Tensor:
    """Rewards (B,) of sequences in one forward pass, read at each one's last token."""
    device = next(model.parameters()).device
    ids_BT, attention_BT = right_padded([s.prompt + s.completion for s in sequences])
    last_B = torch.tensor([len(s) - 1 for s in sequences], device=device)
    with autocast(precision, device):  # type: ignore[arg-type]
        return model(ids_BT.to(device), attention_BT.to(device), last_B)


@torch.no_grad()
def score(
    model: RewardModel,
    sequences: Seq[Sequence],
    precision: str,
    token_budget: int = 4096,
    progress: Callable[[int], None] = lambda done: None,
) -> list[float]:
    """Rewards of any number of sequences, in order, batched by length."""
    model.eval()
    rewards = [0.0] * len(sequences)
    done = 0
    for group in length_batches([len(s) for s in sequences], token_budget):
        values = reward_of(model, [sequences[i] for i in group], precision)
        for index, value in zip(group, values.tolist(), strict=True):
            rewards[index] = value
        done += len(group)
        progress(done)
    return rewards


def scoring_flops(shape: cost.Shape, sequences: Seq[Sequence], token_budget: int = 4096) -> float:
    """Operations of `score`, of a reward model of this shape."""
    groups = length_batches([len(s) for s in sequences], token_budget)
    return sum(cost.forward(shape, *read_sizes([sequences[i] for i in group])) for group in groups)


def normalise_on(
    model: RewardModel, pairs: Seq[TokenPair], precision: str, most: int = 256
) -> dict[str, float]:
    """Set the model's gain and bias so that rewards of training answers have mean 0 and deviation 1.

    Returns the accuracy on these pairs, which normalising does not change.
    """
    some = list(pairs)[:most]
    raw = torch.tensor(score(model, [s for p in some for s in (p.chosen, p.rejected)], precision))
    model.normalise(raw)
    return {"accuracy": float((raw[0::2] > raw[1::2]).float().mean())}
