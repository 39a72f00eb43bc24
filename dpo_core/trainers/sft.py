"""Trains by supervised fine-tuning on demonstrations; the result becomes the reference."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dpo_core.data.files.parquet import read_parquet
from dpo_core.data.tokens.sequences import TokenSequence
from dpo_core.methods.job import Job
from dpo_core.methods.sft import SftConfig
from dpo_core.scoring.autocast import autocast
from dpo_core.scoring.branch_scores import branch_scores
from dpo_core.scoring.document import Document
from dpo_core.trainers.common import Export, export_model, start
from dpo_core.training.loop import PackedTrainer


@dataclass(frozen=True)
class Demonstration:
    """A completion to imitate."""

    id: str
    sequence: TokenSequence


class SftTrainer(PackedTrainer[Demonstration]):
    """Trainer whose loss is the mean cross-entropy over the learnt tokens of the global batch, without
    prompts."""

    def length(self, example: Demonstration) -> int:
        return len(example.sequence)

    def weight(self, example: Demonstration) -> float:
        return float(example.sequence.targets)

    def document(self, example: Demonstration) -> Document:
        return Document.of(example.sequence)

    def losses(self, batch: Sequence[Demonstration]) -> tuple[Tensor, dict[str, Tensor]]:
        with autocast(self.config.engine.precision, self.engine.device):
            logps_SL = branch_scores(self.module, self.lay_out(batch)).logps_SL
        return -logps_SL.sum(), {"logps/chosen": logps_SL.sum()}


def build(job: Job, config: SftConfig) -> tuple[Any, Export]:
    model, tokenizer, tokenise = start(job, config)
    examples = []
    for row in read_parquet(job.data):
        sequence = tokenise.demonstration(row)
        if isinstance(sequence, TokenSequence):
            examples.append(Demonstration(row["id"], sequence))
    trainer = SftTrainer(model, examples, config, seed=job.seed, work=Path(job.work))
    return trainer, export_model(model, tokenizer, job, config)
