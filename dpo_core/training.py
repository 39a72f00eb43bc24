"""The training loop that SFT, DPO and reward modelling share: order of examples, steps, metrics, resume.

PPO draws its own data and has its own loop; it uses the same engine.
"""

import json
import logging
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from dpo_core.config import Config
from dpo_core.engine import Engine, MetricsFile, Stopped
from dpo_core.engine_config import EngineConfig, OptimConfig
from dpo_core.errors import RecipeError, StageFailed

log = logging.getLogger(__name__)
Example = TypeVar("Example")


class LoopConfig(Config):
    """What every loop over a fixed set of examples reads."""

    epochs: float = Field(1.0, gt=0)
    """Passes over the training examples."""
    max_steps: int | None = Field(None, ge=1)
    """Stop after so many optimiser steps, whatever `epochs` says."""
    batch_size: int = Field(16, ge=1)
    """Examples (pairs, for preferences) in one optimiser step, over all ranks."""
    micro_batch_size: int = Field(8, ge=1)
    """Examples in one forward pass on one rank."""
    optim: OptimConfig = OptimConfig()
    """Optimiser and schedule."""
    engine: EngineConfig = EngineConfig()
    """Precision, ZeRO stage, ranks, checkpoints."""

    @model_validator(mode="after")
    def _batches_divide(self) -> "LoopConfig":
        share = self.micro_batch_size * self.engine.processes
        if self.batch_size % share:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size x processes = {share}"
            )
        return self

    def steps(self, examples: int) -> int:
        """Optimiser steps for so many examples."""
        wanted = max(1, round(examples * self.epochs / self.batch_size))
        return min(wanted, self.max_steps or wanted)


class Order:
    """An endless order of example indices: seeded epochs, each a fresh shuffle, end to end.

    Step k always gets the same indices, whatever came before: the position is the whole state.
    """

    def __init__(self, examples: int, seed: int) -> None:
        self.examples, self.seed = examples, seed

    def batch(self, step: int, size: int) -> list[int]:
        """Indices of the batch of a step (0-based)."""
        first = step * size
        return [self._at(position) for position in range(first, first + size)]

    def _at(self, position: int) -> int:
        epoch, place = divmod(position, self.examples)
        return int(self._epoch(epoch)[place])

    def _epoch(self, epoch: int) -> np.ndarray:
        if getattr(self, "_cached", (None,))[0] != epoch:
            shuffled = np.random.default_rng((self.seed, epoch)).permutation(self.examples)
            self._cached: tuple[int, np.ndarray] = (epoch, shuffled)
        return self._cached[1]


class Trainer(ABC, Generic[Example]):
    """One training job. A subclass says what an example is and what its loss is."""

    def __init__(
        self, module: nn.Module, examples: Seq[Example], config: LoopConfig, *, seed: int, work: Path
    ) -> None:
        if not examples:
            raise StageFailed("there is nothing to train on", "Look at what the data gate dropped and why")
        world = torch.distributed.get_world_size()
        if config.batch_size % (config.micro_batch_size * world):
            raise RecipeError(
                f"a batch of {config.batch_size} cannot be split into micro-batches of "
                f"{config.micro_batch_size} on {world} ranks",
                "Choose a multiple of their product",
            )
        self.config, self.examples, self.work = config, examples, work
        self.module = module
        self.order = Order(len(examples), seed)
        self.total_steps = config.steps(len(examples))
        if config.engine.gradient_checkpointing:
            module.gradient_checkpointing_enable()  # type: ignore[operator]
        self.engine = Engine(
            module,
            config.optim,
            config.engine,
            total_steps=self.total_steps,
            micro_batches=config.batch_size // (config.micro_batch_size * world),
            work=work,
        )

    @abstractmethod
    def length(self, example: Example) -> int:
        """Tokens of an example; neighbours in length share a micro-batch."""

    @abstractmethod
    def weight(self, example: Example) -> float:
        """What an example counts in the mean of the loss: 1 for pairs, its tokens for SFT."""

    @abstractmethod
    def losses(self, batch: Seq[Example]) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum of the loss over a micro-batch, and sums of metrics over its examples."""

    def tokens(self, example: Example) -> int:
        """Tokens that go through the model for an example."""
        return self.length(example)

    def check_start(self) -> None:
        """Called once, before the first step of a fresh run."""

    def train(self) -> dict[str, float]:
        """Run to the last step, from the newest checkpoint if there is one. Returns the last step's metrics.

        Raises:
            Stopped: SIGTERM came; the state was saved.
            StageFailed: a loss or gradient was not finite; the message names the step and its examples.
        """
        state = self.engine.load_latest()
        done = int(state["step"]) if state else 0
        if not done:
            self.engine.run(self.check_start)
        rank0 = self.engine.rank == 0
        metrics = MetricsFile(self.work / "metrics.jsonl", resume_after=done) if rank0 else None
        last: dict[str, float] = dict(state["metrics"]) if state else {}
        for step in range(done, self.total_steps):
            last = self._step(step)
            if metrics:
                metrics.write(step + 1, last)
            stop = self.engine.stop_requested()
            final = step + 1 == self.total_steps
            if stop or final or (step + 1) % self.config.engine.save_every == 0:
                self.engine.save(step + 1, {"metrics": last})
            if stop and not final:
                raise Stopped
        return last

    def _step(self, step: int) -> dict[str, float]:
        start = time.perf_counter()
        rate = self.engine.learning_rate
        everyone = [self.examples[i] for i in self.order.batch(step, self.config.batch_size)]
        total = sum(self.weight(e) for e in everyone)
        # Sorted before it is dealt out, so that ranks get like lengths and micro-batches little padding.
        everyone.sort(key=self.length)
        mine = everyone[self.engine.rank :: self.engine.world]
        sums: dict[str, Tensor] = {}
        norm: float | None = None
        for first in range(0, len(mine), self.config.micro_batch_size):
            micro = mine[first : first + self.config.micro_batch_size]
            loss, numbers = self.engine.run(self.losses, micro)
            self._require_finite(loss, step, micro)
            self.engine.backward(loss, total)
            norm = self.engine.step()
            for name, value in {"loss": loss.detach() / total, **numbers}.items():
                sums[name] = sums.get(name, torch.zeros(())) + value.detach().double().cpu()
        values = self._reduce(sums, len(everyone))
        seconds = time.perf_counter() - start
        return values | {
            "grad_norm": norm or 0.0,
            "learning_rate": rate,
            "epoch": (step + 1) * self.config.batch_size / len(self.examples),
            "num_tokens": float(sum(self.tokens(e) for e in everyone)),
            "tokens_per_second": sum(self.tokens(e) for e in everyone) / seconds,
            "seconds_per_step": seconds,
        }

    def _reduce(self, sums: dict[str, Tensor], examples: int) -> dict[str, float]:
        """Means over the examples of the global batch; the loss is a mean already."""
        names = sorted(sums)
        stacked = self.engine.all_sum(torch.stack([sums[name].float() for name in names]))
        values = dict(zip(names, stacked.tolist(), strict=True))
        return {name: value if name == "loss" else value / examples for name, value in values.items()}

    def _require_finite(self, loss: Tensor, step: int, micro: Seq[Example]) -> None:
        if not torch.isfinite(loss):
            ids = [getattr(e, "id", "?") for e in micro]
            raise StageFailed(
                f"the loss of step {step + 1} is {loss.item()}; its examples: {', '.join(ids[:8])}",
                "Look at these rows, or lower the learning rate; the last checkpoint is kept",
            )


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """`result.json`, whole or not at all: the launcher's proof that a job came to its end."""
    temporary = folder / "result.json.tmp"
    temporary.write_text(json.dumps(result, indent=1))
    os.replace(temporary, folder / "result.json")
