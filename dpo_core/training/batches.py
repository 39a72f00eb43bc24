"""Which examples a step trains on, and which of them share a forward pass on each rank."""

from collections.abc import Sequence as Seq
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from dpo_core.errors import RecipeError
from dpo_core.training.pack_plan import PackPlan, plan_epoch


class Batch(NamedTuple):
    """Indices of examples."""

    everyone: list[int]
    """The global batch, over all ranks."""
    mine: list[list[int]]
    """The micro-batches of this rank, equally many on every rank and in every step."""
    passes: list[list[int]]
    """The micro-batches of all ranks."""


class Batches(Protocol):
    """A series of batches. Step k is the same whatever ran before: the position is the whole state."""

    micro_batches: int
    """Forward passes of a step on each rank."""

    def of_step(self, step: int) -> Batch:
        """The batch of a step (0-based)."""
        ...


class Order:
    """An endless order of example indices: seeded epochs, each a fresh shuffle, end to end.

    Step k always gets the same indices, whatever came before: the position is the whole state.
    """

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
    """Micro-batches of a fixed number of examples, neighbours in length."""

    def __init__(
        self, lengths: Seq[int], batch_size: int, micro_batch_size: int, *, seed: int, rank: int, world: int
    ) -> None:
        if batch_size % (micro_batch_size * world):
            raise RecipeError(
                f"a batch of {batch_size} cannot be split into micro-batches of {micro_batch_size} on "
                f"{world} ranks",
                "Choose a multiple of their product",
            )
        self.lengths, self.batch_size, self.micro_batch_size = lengths, batch_size, micro_batch_size
        self.rank, self.world = rank, world
        self.order = Order(len(lengths), seed)
        self.micro_batches = batch_size // (micro_batch_size * world)

    def of_step(self, step: int) -> Batch:
        # Sorted before it is dealt out, so that ranks get like lengths and micro-batches little padding.
        everyone = sorted(self.order.batch(step, self.batch_size), key=lambda i: self.lengths[i])
        ranks = [self._micro_batches(everyone[rank :: self.world]) for rank in range(self.world)]
        return Batch(everyone, ranks[self.rank], [micro for share in ranks for micro in share])

    def _micro_batches(self, share: list[int]) -> list[list[int]]:
        size = self.micro_batch_size
        return [share[first : first + size] for first in range(0, len(share), size)]


class PackedBatches:
    """Micro-batches that are packs of a fixed number of tokens (see `pack_plan`).

    Args:
        lengths_E: tokens that each example takes in a pack.
        epochs: epochs that will be trained, so that all have as many packs a step.
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
        least = [plan(epoch) for epoch in range(epochs)]
        most = max(one.per_step for one in least) // world
        self.plans = [
            one if one.per_step == most * world else plan(epoch, most) for epoch, one in enumerate(least)
        ]
        self.micro_batches = most
        self.length = max(one.length for one in self.plans)
        """Tokens of the fullest pack of all epochs."""

    def of_step(self, step: int) -> Batch:
        # Every epoch has the same number of steps: it follows from the number of examples.
        epoch, place = divmod(step, self.plans[0].steps)
        plan = self.plans[epoch]
        packs = [pack.tolist() for pack in plan.of_step(place)]
        mine = [pack.tolist() for pack in plan.of_step(place, self.rank, self.world)]
        return Batch([index for pack in packs for index in pack], mine, packs)
