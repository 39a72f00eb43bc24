"""Plans which examples of an epoch share a pack, from their lengths alone.

Shapes: E examples of the training set.
"""

import heapq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dpo_core.errors import RecipeError


@dataclass(frozen=True)
class PackPlan:
    """The packs of one epoch, as indices of examples. `packs[step * per_step + k]` is pack k of a step."""

    packs: tuple[NDArray[np.int64], ...]
    steps: int
    per_step: int
    length: int
    """Tokens of the fullest pack, to which all are padded."""
    tokens: int
    """Tokens of all packs together."""

    @property
    def waste(self) -> float:
        """Share of padding if every pack has the plan's length."""
        return 1 - self.tokens / (self.length * len(self.packs))

    def of_step(self, step: int, rank: int = 0, world: int = 1) -> list[NDArray[np.int64]]:
        """The packs of one rank in one step of the epoch (0-based)."""
        first = step * self.per_step
        return [self.packs[i] for i in range(first + rank, first + self.per_step, world)]


def plan_epoch(
    lengths_E: NDArray[np.int64],
    batch_size: int,
    budget: int,
    *,
    world: int,
    seed: int,
    epoch: int,
    packs_per_rank: int = 1,
) -> PackPlan:
    """Distribute the examples of an epoch over packs of at most `budget` tokens.

    Every step has exactly `batch_size` examples in the same number of packs, at least `packs_per_rank` on
    each rank. Examples that do not fill a batch are left out of this epoch; other ones are in the next. The
    plan follows from the lengths and a seeded shuffle, so every rank and every resumed run makes the same.

    Level packs instead of first-fit-decreasing over the epoch: first-fit fills the first packs with the
    longest examples and the last with the shortest, so that steps differ in size and in kind. Here sorted
    examples are assigned to the steps round after round, the longest of a round to the emptiest step, and
    within a step each goes to the emptiest pack: all packs are alike in tokens and in mix, and little padding
    is needed to bring them to the length of the fullest.

    Raises:
        RecipeError: an example is longer than the budget, or a batch cannot be shared by the ranks.
    """
    generator = np.random.default_rng((seed, epoch))
    order_E = generator.permutation(len(lengths_E))
    batch = min(batch_size, len(lengths_E))
    steps = max(1, len(lengths_E) // batch)
    chosen = order_E[: steps * batch]
    longest = int(lengths_E[chosen].max())
    if longest > budget:
        raise RecipeError(
            f"the longest example has {longest} tokens, more than a pack ({budget})",
            f"Raise pack_tokens to {longest} or more, or lower tokens.max_length",
        )
    if batch < world:
        raise RecipeError(
            f"a batch of {batch} examples cannot be shared by {world} ranks",
            "Raise batch_size, or lower the number of ranks",
        )
    batches = _deal(lengths_E, chosen, steps, generator)
    tokens = int(lengths_E[chosen].sum())
    fewest = -(-tokens // (budget * steps * world))
    for per_rank in range(max(packs_per_rank, fewest), batch // world + 1):
        parts = [_level(lengths_E, examples, per_rank * world) for examples in batches]
        length = max(load for _, load in parts)
        if length <= budget:
            packs = tuple(pack for packs, _ in parts for pack in packs)
            return PackPlan(packs, steps, per_rank * world, length, tokens)
    needed = max(_level(lengths_E, examples, batch // world * world)[1] for examples in batches)
    raise RecipeError(
        f"a batch of {batch} examples does not fit on {world} ranks: some packs hold two examples that "
        f"together exceed {budget} tokens (pack_tokens)",
        f"Make batch_size a multiple of {world}, or raise pack_tokens to {needed} or more",
    )


def _deal(
    lengths_E: NDArray[np.int64], chosen: NDArray[np.int64], steps: int, generator: np.random.Generator
) -> NDArray[np.int64]:
    """(steps, batch): each batch has one example of every round of similar lengths."""
    # Lengths are jittered, so that the same examples do not share a batch in every epoch.
    jittered = lengths_E[chosen] * generator.uniform(0.9, 1.1, len(chosen))
    rounds = chosen[np.argsort(-jittered, kind="stable")].reshape(-1, steps)
    loads = np.zeros(steps, np.int64)
    batches = np.empty((steps, len(rounds)), np.int64)
    for number, examples in enumerate(rounds):
        emptiest = np.argsort(loads, kind="stable")
        batches[emptiest, number] = examples[np.argsort(-lengths_E[examples], kind="stable")]
        loads += lengths_E[batches[:, number]]
    return batches[generator.permutation(steps)]


def _level(
    lengths_E: NDArray[np.int64], examples: NDArray[np.int64], packs: int
) -> tuple[list[NDArray[np.int64]], int]:
    """Packs of the examples, each added to the emptiest, longest first; and the tokens of the fullest."""
    emptiest = [(0, number) for number in range(packs)]
    contents: list[list[int]] = [[] for _ in range(packs)]
    for example in examples[np.argsort(-lengths_E[examples], kind="stable")].tolist():
        load, number = emptiest[0]
        contents[number].append(example)
        heapq.heapreplace(emptiest, (load + int(lengths_E[example]), number))
    return [np.array(pack, np.int64) for pack in contents], max(load for load, _ in emptiest)
