"""Supervised fine-tuning on completions: the model that becomes the reference."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator
from torch import Tensor

from dpo_core.data.tokens.tokenise import Sequence
from dpo_core.methods.build import export_model, read_rows, start
from dpo_core.methods.estimate import Inputs, Work, loop
from dpo_core.methods.job import Job
from dpo_core.methods.method import GRADIENT, LOSS, Export, Method
from dpo_core.models.lora_config import LoraConfig
from dpo_core.scoring.branch_scores import branch_scores
from dpo_core.scoring.document import Document
from dpo_core.scoring.logprobs import autocast
from dpo_core.training.config import EngineConfig, OptimConfig, PackedLoopConfig
from dpo_core.training.loop import PackedTrainer


class SftConfig(PackedLoopConfig):
    """How the reference is prepared."""

    enabled: bool = True
    """False: the base model as it is becomes the reference."""
    demonstrations: str | None = Field(None, min_length=1)
    """File of demonstrations, rows of {prompt, completion}. Empty: the chosen or desirable answers."""
    made_demonstrations: int | None = Field(None, ge=1)
    """Number of self-made review demonstrations, for the self-made openings."""
    batch_size: int = Field(16, ge=1)
    """Demonstrations in one optimiser step, over all ranks."""
    optim: OptimConfig = OptimConfig(learning_rate=2e-5)
    """Optimiser and schedule."""
    engine: EngineConfig = EngineConfig()
    """Precision, ZeRO stage, ranks, checkpoints."""
    lora: LoraConfig | None = None
    """Train low-rank additions only, merged into the result; empty trains every weight."""

    @model_validator(mode="after")
    def _one_source(self) -> "SftConfig":
        if self.demonstrations is not None and self.made_demonstrations is not None:
            raise ValueError("demonstrations and made_demonstrations are both set: choose one")
        return self


@dataclass(frozen=True)
class Demonstration:
    """A completion to imitate."""

    id: str
    sequence: Sequence


class SftTrainer(PackedTrainer[Demonstration]):
    """Mean cross-entropy over the learnt tokens of the global batch; prompts carry no loss."""

    def length(self, example: Demonstration) -> int:
        return len(example.sequence)

    def weight(self, example: Demonstration) -> float:
        return float(example.sequence.targets)

    def document(self, example: Demonstration) -> Document:
        return Document.of(example.sequence)

    def losses(self, batch: Seq[Demonstration]) -> tuple[Tensor, dict[str, Tensor]]:
        with autocast(self.config.engine.precision, self.engine.device):
            logps_SL = branch_scores(self.module, self.lay_out(batch)).logps_SL
        return -logps_SL.sum(), {"logps/chosen": logps_SL.sum()}


def build(job: Job, config: SftConfig) -> tuple[Any, Export]:
    """See `Method.build`."""
    model, tokenizer, tokenise = start(job, config)
    examples = []
    for row in read_rows(job.data):
        sequence = tokenise.demonstration(row)
        if isinstance(sequence, Sequence):
            examples.append(Demonstration(row["id"], sequence))
    trainer = SftTrainer(model, examples, config, seed=job.seed, work=Path(job.work))
    return trainer, export_model(model, tokenizer, job, lora=config.lora is not None)


def estimate(config: SftConfig, inputs: Inputs) -> Work:
    """See `Method.estimate`."""
    return loop(config, inputs.examples("demonstrations"), inputs)


METHOD = Method(
    name="sft",
    title="Supervised fine-tuning",
    citation="Ouyang et al. 2022, arXiv 2203.02155, section 3.5",
    settings=SftConfig,
    data="demonstrations",
    build=build,
    estimate=estimate,
    curves=(LOSS, GRADIENT),
    version=2,
    policy=False,
)
