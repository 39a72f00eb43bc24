"""Batches: which examples a step trains on, and which of them share a forward pass on each rank."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from dpo_core.errors import RecipeError
from dpo_core.training.pack_plan import PackPlan, plan_epoch


class Batch(NamedTuple):
    """Indices of examples."""

    examples: list[int]
    """The global batch, over all ranks."""
    micro_batches: list[list[int]]
    """Those of this rank, equally many on every rank and in every step."""
    all_micro_batches: list[list[int]]
    """Those of all ranks."""


class Batches(Protocol):
    """A series of batches. The batch of step k depends on k alone, so a resumed run needs no other state."""

    micro_batches: int
    """Forward passes of a step on each rank."""

    def of_step(self, step: int) -> Batch:
        """The batch of a step (0-based)."""
        ...


class Order:
    """An endless order of example indices: one epoch after the other, each shuffled with the seed."""

    def __init__(self, examples: int, seed: int) -> None:
        self.examples, self.seed = examples, seed

    def batch(self, step: int, size: int) -> list[int]:
        """Indices of the batch of a step (0-based)."""
        first = step * size
        return [self.at(position) for position in range(first, first + size)]

    def at(self, position: int) -> int:
        """The index at a position, counted from the start of the first epoch."""
        epoch, place = divmod(position, self.examples)
        return int(self._epoch(epoch)[place])

    def _epoch(self, epoch: int) -> np.ndarray:
        if getattr(self, "_cached", (None,))[0] != epoch:
            shuffled = np.random.default_rng((self.seed, epoch)).permutation(self.examples)
            self._cached: tuple[int, np.ndarray] = (epoch, shuffled)
        return self._cached[1]


class PaddedBatches:
    """Micro-batches of a fixed number of examples of similar length."""

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        micro_batch_size: int,
        *,
        seed: int,
        rank: int,
        world: int,
    ) -> None:
        if batch_size % (micro_batch_size * world):
            raise RecipeError(
                f"a batch of {batch_size} cannot be split into micro-batches of {micro_batch_size} on "
                f"{world} ranks",
                f"Choose a multiple of {micro_batch_size * world}",
            )
        self.lengths, self.batch_size, self.micro_batch_size = lengths, batch_size, micro_batch_size
        self.rank, self.world = rank, world
        self.order = Order(len(lengths), seed)
        self.micro_batches = batch_size // (micro_batch_size * world)

    def of_step(self, step: int) -> Batch:
        # Sorted first, so that ranks get similar lengths and micro-batches little padding.
        examples = sorted(self.order.batch(step, self.batch_size), key=lambda i: self.lengths[i])
        ranks = [self._micro_batches(examples[rank :: self.world]) for rank in range(self.world)]
        return Batch(examples, ranks[self.rank], [micro for share in ranks for micro in share])

    def _micro_batches(self, share: list[int]) -> list[list[int]]:
        size = self.micro_batch_size
        return [share[first : first + size] for first in range(0, len(share), size)]


class PackedBatches:
    """Micro-batches that are packs with a fixed token budget (see `pack_plan`).

    Args:
        lengths_E: tokens that each example takes in a pack.
        epochs: epochs that will be trained; a step has the same number of packs in all of them.
    """

    def __init__(
        self,
        lengths_E: NDArray[np.int64],
        batch_size: int,
        pack_tokens: int,
        *,
        epochs: int,
        seed: int,
        rank: int,
        world: int,
    ) -> None:
        def plan(epoch: int, packs_per_rank: int = 1) -> PackPlan:
            return plan_epoch(
                lengths_E,
                batch_size,
                pack_tokens,
                world=world,
                seed=seed,
                epoch=epoch,
                packs_per_rank=packs_per_rank,
            )

        self.rank, self.world = rank, world
        plans = [plan(epoch) for epoch in range(epochs)]
        packs_per_rank = max(epoch_plan.per_step for epoch_plan in plans) // world
        self.plans = [
            epoch_plan if epoch_plan.per_step == packs_per_rank * world else plan(epoch, packs_per_rank)
            for epoch, epoch_plan in enumerate(plans)
        ]
        self.micro_batches = packs_per_rank
        self.length = max(epoch_plan.length for epoch_plan in self.plans)
        """Tokens of the fullest pack of all epochs."""

    def of_step(self, step: int) -> Batch:
        # Every epoch has the same number of steps: it follows from the number of examples.
        epoch, place = divmod(step, self.plans[0].steps)
        plan = self.plans[epoch]
        packs = [pack.tolist() for pack in plan.of_step(place)]
        own = [pack.tolist() for pack in plan.of_step(place, self.rank, self.world)]
        return Batch([index for pack in packs for index in pack], own, packs)
