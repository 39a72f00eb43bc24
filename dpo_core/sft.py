"""Supervised fine-tuning on completions: the model that becomes the reference."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

from pydantic import Field
from torch import Tensor

from dpo_core.engine import EngineConfig, OptimConfig
from dpo_core.logprobs import autocast, collate, token_logps
from dpo_core.tokens import Sequence
from dpo_core.training import LoopConfig, Trainer


class SftConfig(LoopConfig):
    """How the reference is prepared."""

    enabled: bool = True
    """False: the base model as it is becomes the reference."""
    batch_size: int = Field(16, ge=1)
    """Demonstrations in one optimiser step, over all ranks."""
    optim: OptimConfig = OptimConfig(learning_rate=2e-5)
    """Optimiser and schedule."""
    engine: EngineConfig = EngineConfig()
    """Precision, ZeRO stage, ranks, checkpoints."""


@dataclass(frozen=True)
class Demonstration:
    """A completion to imitate."""

    id: str
    sequence: Sequence


class SftTrainer(Trainer[Demonstration]):
    """Mean cross-entropy over the completion tokens of the global batch; prompts carry no loss."""

    def length(self, example: Demonstration) -> int:
        return len(example.sequence)

    def weight(self, example: Demonstration) -> float:
        return float(len(example.sequence.completion))

    def losses(self, batch: Seq[Demonstration]) -> tuple[Tensor, dict[str, Tensor]]:
        rows = collate([e.sequence for e in batch]).to(self.engine.device)
        with autocast(self.config.engine.precision, self.engine.device):
            logps_BT = token_logps(self.module, rows)
        return -logps_BT.sum(), {"logps/chosen": logps_BT.sum()}
