"""Trains a Bradley-Terry reward model on pairs."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpo_core.data.files.parquet import read_parquet
from dpo_core.data.tokens.sequences import TokenPair
from dpo_core.methods.job import Job
from dpo_core.methods.reward import RewardModelConfig, no_agreement
from dpo_core.models.reward_model import RewardModel, bradley_terry_loss
from dpo_core.rewards.model import normalise_on, read_sizes, reward_of
from dpo_core.scoring import flops as cost
from dpo_core.scoring.attention import trunk_of
from dpo_core.trainers.common import Export, start
from dpo_core.training.engine import load_full_state
from dpo_core.training.loop import Trainer


class RewardTrainer(Trainer[TokenPair]):
    """Trainer whose loss is the mean of the Bradley-Terry loss over the pairs of the global batch."""

    module: RewardModel
    config: RewardModelConfig

    def __init__(
        self,
        module: RewardModel,
        examples: Sequence[TokenPair],
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

    def sizes(self, batch: Sequence[TokenPair]) -> cost.Sizes:
        return read_sizes([s for e in batch for s in (e.chosen, e.rejected)])

    def losses(self, batch: Sequence[TokenPair]) -> tuple[Tensor, dict[str, Tensor]]:
        sequences = [e.chosen for e in batch] + [e.rejected for e in batch]
        rewards_2B = reward_of(self.module, sequences, self.config.engine.precision)
        chosen_B, rejected_B = rewards_2B.chunk(2)
        margins_B = chosen_B.new_tensor([self.config.margin_of(e.agreement) for e in batch])
        losses_B = bradley_terry_loss(chosen_B, rejected_B, margins_B, self.config.centring)
        with torch.no_grad():
            metrics = {
                "rewards/chosen": chosen_B.sum(),
                "rewards/rejected": rejected_B.sum(),
                "rewards/margins": (chosen_B - rejected_B).sum(),
                "rewards/accuracies": (chosen_B > rejected_B).float().sum(),
            }
        return losses_B.sum(), metrics


def build(job: Job, config: RewardModelConfig) -> tuple[Any, Export]:
    model, tokenizer, tokenise = start(job, config)
    pairs, _ = tokenise.pairs(read_parquet(job.data))
    reward_model = RewardModel(trunk_of(model), torch.Generator().manual_seed(job.seed))
    trainer = RewardTrainer(reward_model, pairs, config, seed=job.seed, work=Path(job.work))

    def export(state: dict[str, Tensor]) -> None:
        load_full_state(reward_model, state)
        facts = normalise_on(reward_model, pairs, config.engine.precision)
        reward_model.save(Path(job.out))
        tokenizer.save_pretrained(job.out)
        (Path(job.out) / "reward.json").write_text(json.dumps(facts))

    return trainer, export
