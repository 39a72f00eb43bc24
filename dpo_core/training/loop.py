"""The training loop on a fixed set of examples (SFT, DPO, KTO, reward model): steps, metrics, resume.

Methods that sample their own data use `trainers.online.loop`, with the same engine.
"""

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from dpo_core.errors import NeedsNewSettings, StageFailed
from dpo_core.models.dropout import set_training
from dpo_core.scoring import flops as cost
from dpo_core.scoring.attention import checkpoint_layers, round_up_to_block, trunk_of
from dpo_core.scoring.document import Document
from dpo_core.scoring.flops import keeps_logits
from dpo_core.scoring.layout import Layout, Pack, pack, pad
from dpo_core.scoring.model_shape import shape_of
from dpo_core.scoring.packing_check import packing_fault
from dpo_core.training.batches import Batch, Batches, PackedBatches, PaddedBatches
from dpo_core.training.config import LoopConfig, PackedLoopConfig
from dpo_core.training.engine import Engine, MetricsFile
from dpo_core.training.routing import RouterBalance, router_balance
from dpo_core.training.stop import Stopped

log = logging.getLogger(__name__)
Example = TypeVar("Example")


class StepTrainer(ABC):
    """Steps with one engine, from the newest checkpoint to the end. A subclass defines a step."""

    engine: Engine
    total_steps: int

    @abstractmethod
    def step(self, step: int) -> dict[str, float]:
        """Do a step (0-based); returns its metrics."""

    def begin(self, resumed: bool) -> None:  # noqa: B027 - most steps need none
        """Called once, before the first step."""

    def state(self) -> dict[str, Any]:
        """State that a checkpoint keeps besides the engine's."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:  # noqa: B027 - most trainers have none
        """Restore what `state` returned."""

    def train(self) -> dict[str, float]:
        """Do all steps that are left. Returns the last step's metrics.

        Raises:
            Stopped: a stop signal was received; the state is saved.
            StageFailed: a loss or gradient was not finite; the message names the step and its examples.
        """
        engine, state = self.engine, self.engine.load_latest()
        done = int(state["step"]) if state else 0
        last: dict[str, float] = dict(state["metrics"]) if state else {}
        if state:
            self.load_state(state["trainer"])
        self.begin(resumed=state is not None)
        metrics = MetricsFile(engine.checkpoints.curve, resume_after=done) if engine.rank == 0 else None
        for step in range(done, self.total_steps):
            last = self.step(step)
            if metrics:
                metrics.write(step + 1, last)
            stop = engine.stop_requested()
            final = step + 1 == self.total_steps
            if stop or final or (step + 1) % engine.config.save_every == 0:
                engine.save(step + 1, {"metrics": last, "trainer": self.state()})
            if stop and not final:
                raise Stopped(engine.signals.received)
        return last


class Trainer(StepTrainer, Generic[Example]):
    """One training job. A subclass defines an example and its loss."""

    def __init__(
        self, module: nn.Module, examples: Sequence[Example], config: LoopConfig, *, seed: int, work: Path
    ) -> None:
        if not examples:
            raise StageFailed(
                "no training example is left: the data gate or tokenising dropped every row",
                "Look at what the gate drops with: dpo validate FILE; if rows are too long, raise "
                "tokens.max_length",
            )
        self.config, self.examples, self.work, self.seed = config, examples, work, seed
        self.module = module
        self.total_steps = config.steps(len(examples))
        self.batches = self.make_batches()
        self.balance: RouterBalance | None = None
        self.prepare(module)
        self.engine = Engine(
            module,
            config.optim,
            config.engine,
            total_steps=self.total_steps,
            micro_batches=self.batches.micro_batches,
            work=work,
        )

    def prepare(self, module: nn.Module) -> None:
        """Read the model's shape and set its options, before ZeRO shards its weights."""
        self.shape = shape_of(module)
        self.balance = router_balance(module)
        if self.config.engine.gradient_checkpointing:
            checkpoint_layers(module)
        if self.config.engine.compile:
            compile_layers(module)

    @abstractmethod
    def length(self, example: Example) -> int:
        """Tokens of an example; examples of similar length share a micro-batch."""

    @abstractmethod
    def weight(self, example: Example) -> float:
        """Weight of an example in the mean of the loss: 1 for pairs, its tokens for SFT."""

    @abstractmethod
    def losses(self, batch: Sequence[Example]) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum of the loss over a micro-batch, and sums of metrics over its examples."""

    @abstractmethod
    def sizes(self, batch: Sequence[Example]) -> cost.Sizes:
        """Size of the forward pass of a micro-batch, computed from lengths only."""

    def flops(self, batch: Batch) -> float:
        """Operations of a step over all ranks, including padding and recomputation."""
        return sum(self.micro_flops([self.examples[i] for i in micro]) for micro in batch.all_micro_batches)

    def micro_flops(self, micro: Sequence[Example]) -> float:
        """Operations of forward and backward of a micro-batch."""
        return self.trained_flops(self.sizes(micro))

    def trained_flops(self, sizes: cost.Sizes) -> float:
        """Operations of forward and backward of the trained model."""
        return cost.training(
            self.shape,
            *sizes,
            checkpointing=self.config.engine.gradient_checkpointing,
            recompute_head=not keeps_logits(round(sizes.scored), self.shape.vocabulary),
        )

    def make_batches(self) -> Batches:
        """The micro-batches of the examples."""
        world = torch.distributed.get_world_size()
        return PaddedBatches(
            [self.length(e) for e in self.examples],
            self.config.batch_size,
            self.config.padded_micro_batch_size(world),
            seed=self.seed,
            rank=torch.distributed.get_rank(),
            world=world,
        )

    def end_step(self, step: int) -> None:
        """Called after the optimiser stepped (0-based), before a checkpoint is written."""

    def begin_step(self, batch: Sequence[Example]) -> None:
        """Called with the global batch before its losses, for values that depend on all its examples."""

    def tokens(self, example: Example) -> int:
        """Tokens of an example; the prompt counts once for each completion."""
        return self.length(example)

    def check_start(self) -> None:
        """Called once, before the first step of a fresh run."""

    def begin(self, resumed: bool) -> None:
        if not resumed:
            self.engine.run(self.check_start)
        set_training(self.module)

    def step(self, step: int) -> dict[str, float]:
        values = self._step(step)
        self.end_step(step)
        return values

    def _step(self, step: int) -> dict[str, float]:
        start = time.perf_counter()
        rate = self.engine.learning_rate
        batch = self.batches.of_step(step)
        examples = [self.examples[i] for i in batch.examples]
        total = sum(self.weight(e) for e in examples)
        self.begin_step(examples)
        sums: dict[str, Tensor] = {}
        norm: float | None = None
        for indices in batch.micro_batches:
            micro = [self.examples[i] for i in indices]
            loss, numbers = self.engine.run(self._balanced, micro)
            self._require_finite(loss, step, micro)
            self.engine.backward(loss, total)
            norm = self.engine.step(f"step {step + 1} (its examples: {_ids(examples)})")
            for name, value in {"loss": loss.detach() / total, **numbers}.items():
                sums[name] = sums.get(name, torch.zeros(())) + value.detach().double().cpu()
        values = self._reduce(sums, len(examples))
        seconds = time.perf_counter() - start
        return values | {
            "grad_norm": norm or 0.0,
            "learning_rate": rate,
            "epoch": (step + 1) * len(examples) / len(self.examples),
            "num_tokens": float(sum(self.tokens(e) for e in examples)),
            "flops": self.flops(batch),
            "tokens_per_second": sum(self.tokens(e) for e in examples) / seconds,
            "seconds_per_step": seconds,
        }

    def _balanced(self, micro: Sequence[Example]) -> tuple[Tensor, dict[str, Tensor]]:
        """`losses`, with the router's auxiliary loss if the model's config has one."""
        if self.balance is None:
            return self.losses(micro)
        with self.balance.recording():
            loss, numbers = self.losses(micro)
            auxiliary, loads = self.balance.loss()
        weight = self.balance.coefficient * sum(self.weight(e) for e in micro)
        return loss + weight * auxiliary, numbers | {name: v * len(micro) for name, v in loads.items()}

    def _reduce(self, sums: dict[str, Tensor], examples: int) -> dict[str, float]:
        """Means over the examples of the global batch; the loss already is a mean."""
        names = sorted(sums)
        stacked = self.engine.all_sum(torch.stack([sums[name].float() for name in names]))
        values = dict(zip(names, stacked.tolist(), strict=True))
        return {name: value if name == "loss" else value / examples for name, value in values.items()}

    def _require_finite(self, loss: Tensor, step: int, micro: Sequence[Example]) -> None:
        if torch.isfinite(loss):
            return
        causes: list[Example] = []
        if self.config.engine.zero_stage < 3:  # with ZeRO 3 a forward pass needs every rank
            with torch.no_grad():  # one example at a time, to find those that cause it
                causes = [e for e in micro if not torch.isfinite(self.losses([e])[0])]
        raise NeedsNewSettings(
            f"the loss of step {step + 1} is {loss.item()}; its examples: {_ids(causes or micro)}",
            "Look at these rows, or lower the learning rate",
        )


def _ids(examples: Sequence[Any]) -> str:
    """The first ids, for an error."""
    return ", ".join(str(getattr(example, "id", "?")) for example in examples[:8])


class PackedTrainer(Trainer[Example]):
    """A trainer on prompts with completions: in packs if the model can be packed, else in padded rows."""

    config: PackedLoopConfig

    @abstractmethod
    def document(self, example: Example) -> Document:
        """The prompt of an example with its completions."""

    def make_batches(self) -> Batches:
        lengths_E = np.array([len(self.document(e)) for e in self.examples])
        fault = None
        if self.config.pack_tokens is not None:
            fault = packing_fault(self.module, int(lengths_E.max()))
            if fault:
                log.warning("training on padded rows instead of packs: %s", fault)
        self.packed = self.config.pack_tokens is not None and fault is None
        if not self.packed or self.config.pack_tokens is None:
            return super().make_batches()
        steps_an_epoch = max(1, len(self.examples) // self.config.batch_size)
        return PackedBatches(
            lengths_E,
            self.config.batch_size,
            self.config.pack_tokens,
            epochs=-(-self.total_steps // steps_an_epoch),
            seed=self.seed,
            rank=torch.distributed.get_rank(),
            world=torch.distributed.get_world_size(),
        )

    def sizes(self, batch: Sequence[Example]) -> cost.Sizes:
        length = self._fixed_length() if self.packed else None
        return cost.pass_sizes([self.document(e) for e in batch], packed=self.packed, length=length)

    def lay_out(self, examples: Sequence[Example]) -> Layout:
        """A micro-batch as tensors on the device."""
        documents = [self.document(e) for e in examples]
        layout = pack(documents, self._fixed_length()) if self.packed else pad(documents)
        if self.balance is not None and isinstance(layout, Pack):
            self.balance.real_T = (layout.document_T < len(documents)).to(self.engine.device)
        return layout.to(self.engine.device)

    def _fixed_length(self) -> int | None:
        # Compiled GPU kernels need one shape; on a CPU it would only add padding.
        if self.engine.device.type != "cuda" or not isinstance(self.batches, PackedBatches):
            return None
        return round_up_to_block(self.batches.length)


def compile_layers(module: nn.Module) -> None:
    """Compile each decoder layer in place; the names of weights do not change."""
    for layer in trunk_of(getattr(module, "backbone", module)).layers:
        layer.compile()
