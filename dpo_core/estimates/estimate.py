"""Estimates a training from lengths alone: tokens, operations, and its largest micro-batch."""

from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from dpo_core.scoring import flops as cost
from dpo_core.scoring.document import Document, MicroBatch
from dpo_core.scoring.precision import Precision
from dpo_core.training.batches import PackedBatches, PaddedBatches
from dpo_core.training.config import EngineConfig, LoopConfig, PackedLoopConfig

CAPPED = "every completion of the most tokens"


@dataclass(frozen=True)
class EstimatedWork:
    """The estimated work of a stage."""

    tokens: float = 0.0
    flops: float = 0.0
    precision: Precision = "fp32"
    processes: int | None = None
    """Ranks on each node; empty: those of the recipe's `inference`."""
    engine: EngineConfig | None = None
    """Only for a training stage, as are the fields below."""
    fullest: MicroBatch | None = None
    """The micro-batch of the most tokens."""
    micro_batches: int = 1
    references: int = 0
    """Models in memory beside the trained one."""
    note: str = ""
    """The assumption that was made."""


@dataclass(frozen=True)
class Examples:
    """Prompts with completions; `documents` are a sample of `count`."""

    documents: list[Document]
    count: int
    note: str = ""

    def limited(self, limit: int | None) -> "Examples":
        """The same with `count` at most `limit`."""
        return self if limit is None else replace(self, count=min(self.count, limit))


class ExamplesOf(Protocol):
    """Returns the training examples of a kind of data, at most `limit` rows."""

    def __call__(self, data: str, limit: int | None = None) -> Examples: ...


@dataclass(frozen=True)
class Inputs:
    """The inputs of an estimate."""

    shape: cost.Shape
    """Shape of the trained model."""
    examples: ExamplesOf
    """Prompts have a completion of `new_tokens`."""
    packed: bool
    """Whether the model can be packed."""
    seed: int
    new_tokens: int
    """Maximum tokens of a sample."""
    learned_reward: bool
    image_flops: float = 0.0
    """Operations of a forward pass of a diffusion model on one image."""


def read(shape: cost.Shape, examples: Examples) -> tuple[float, float]:
    """Tokens and operations of one forward pass over all examples, each prompt once."""
    sizes = [cost.sizes(d, packed=True) for d in examples.documents] or [cost.Sizes(0.0, 0.0, 0.0)]
    means = [float(np.mean(column)) for column in zip(*sizes, strict=True)]
    return examples.count * means[0], examples.count * cost.forward(shape, *means)


def loop(config: LoopConfig, examples: Examples, inputs: Inputs) -> EstimatedWork:
    """The work of a training on fixed examples."""
    packed = inputs.packed and isinstance(config, PackedLoopConfig) and config.pack_tokens is not None
    trained = config.steps(examples.count) * min(config.batch_size, examples.count)
    sizes = [cost.sizes(d, packed) for d in examples.documents]
    tokens, squares, scored = (float(np.mean(column)) for column in zip(*sizes, strict=True))
    fullest, micro_batches = _fullest(config, examples, inputs.seed, packed)
    flops = cost.training(
        inputs.shape,
        tokens,
        squares,
        scored,
        checkpointing=config.engine.gradient_checkpointing,
        recompute_head=not cost.keeps_logits(fullest.targets, inputs.shape.vocabulary),
    )
    return EstimatedWork(
        tokens=trained * tokens,
        flops=trained * flops,
        precision=config.engine.precision,
        engine=config.engine,
        fullest=fullest,
        micro_batches=micro_batches,
        note=examples.note,
    )


def with_forward_pass(work: EstimatedWork, shape: cost.Shape, references: int) -> EstimatedWork:
    """The work with one more forward pass over its examples, and with models besides the trained one."""
    again = work.flops * cost.forward(shape, 1, 0, 0) / cost.training(shape, 1, 0, 0)
    return replace(work, flops=work.flops + again, references=references)


def _fullest(config: LoopConfig, examples: Examples, seed: int, packed: bool) -> tuple[MicroBatch, int]:
    """The largest micro-batch of the first epoch on rank 0, and the number of micro-batches in a step."""
    ranks, documents = config.engine.processes, examples.documents
    of = np.resize(np.arange(len(documents)), max(examples.count, 1))
    if packed and isinstance(config, PackedLoopConfig) and config.pack_tokens is not None:
        lengths = np.array([len(d) for d in documents])[of]
        batches: Any = PackedBatches(
            lengths, config.batch_size, config.pack_tokens, epochs=1, seed=seed, rank=0, world=ranks
        )
        steps = batches.plans[0].steps
    else:
        rows = np.array([max(len(d.prompt) + len(b) for b in d.branches) for d in documents])[of]
        size = config.padded_micro_batch_size(ranks)
        batches = PaddedBatches(rows.tolist(), config.batch_size, size, seed=seed, rank=0, world=ranks)
        lengths, steps = rows, max(1, len(rows) // config.batch_size)
    micros = [
        m for step in range(min(steps, config.steps(len(of)))) for m in batches.of_step(step).micro_batches
    ]
    fullest = max(micros, key=lambda m: (sum if packed else max)(int(lengths[i]) for i in m))
    chosen = [documents[of[i]] for i in fullest]
    return MicroBatch(chosen, packed), batches.micro_batches


def rounds(config: Any, inputs: Inputs, *, learnt: float = 1.0, critic: bool = False) -> EstimatedWork:
    """The work of online training: sampling, log-probs of policy and reference, scoring, updates.

    Args:
        config: a `RoundsConfig`.
        learnt: share of the samples that are learnt from.
        critic: whether a critic is trained too.
    """
    prompts = inputs.examples("prompts")
    documents = prompts.documents
    episodes = Examples(documents, config.iterations * config.episodes)
    lengths = [len(d.prompt) for d in documents]
    drawn = episodes.count * cost.generation(inputs.shape, lengths, inputs.new_tokens) / len(lengths)
    tokens, once = read(inputs.shape, episodes)
    sizes = [cost.sizes(d, packed=False) for d in documents]
    means = (float(np.mean(column)) for column in zip(*sizes, strict=True))
    trained = cost.training(inputs.shape, *means)
    updates = config.iterations * config.epochs * config.minibatches
    shared = config.micro_batch_size * config.engine.processes
    return EstimatedWork(
        tokens=tokens * (1 + config.epochs * learnt),
        flops=drawn
        + (2 + inputs.learned_reward + critic) * once
        + (1 + critic) * learnt * episodes.count * config.epochs * trained,
        precision=config.engine.precision,
        engine=config.engine,
        fullest=MicroBatch(sorted(documents, key=len)[-config.micro_batch_size :], packed=False),
        micro_batches=max(1, round(learnt * episodes.count * config.epochs / (updates * shared))),
        # A critic counts four times: weights, gradients and the two moments of its optimiser.
        references=1 + inputs.learned_reward + 4 * critic,
        note=CAPPED,
    )


def unknown(tokens: int) -> tuple[int, ...]:
    """A completion of which only the length is used."""
    return (0,) * tokens
