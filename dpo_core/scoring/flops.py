"""What a computation costs in floating-point operations, from a model's configuration and token counts alone.

A matrix weight costs 2 operations a token forward and 4 backward (Kaplan et al. 2020, "6N"); scores and
mixing of attention cost 4 times the attention's width for each pair of positions and layer. Pairs of
positions are counted as kernels with a mask compute them: the whole square of a row. Norms and activations
count nothing.

Shapes: T tokens fed, N scored positions (where the output head runs).
"""

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import NamedTuple

from dpo_core.scoring.document import Document

# Backward of attention: four products of the size of forward's two, with the scores kept from forward.
_ATTENTION_BACKWARD = 2
KEEP_LOGITS_BYTES = 1 << 29
"""Logits above this size are computed again in the backward pass; smaller ones are kept, a quarter faster."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that decide its cost."""

    parameters: int
    """All of them, tied ones once."""
    trunk: int
    """Weights of the layers' matrices: what every token is multiplied by."""
    head: int
    """Weights of the output head: what every scored position is multiplied by."""
    layers: int
    attention: int
    """Width of the attention: heads x size of a head."""
    vocabulary: int
    """Rows of the output head; 1 for a reward model's."""
    frozen_trunk: int = 0
    """Of the trunk's weights, those that are not trained: they need no gradient of their own."""
    frozen_head: int = 0
    """The same of the output head."""

    def as_reward_model(self) -> "Shape":
        """The same trunk with a head of one row."""
        return replace(self, head=self.head // self.vocabulary, vocabulary=1)


class Sizes(NamedTuple):
    """What decides the cost of a forward pass, or a document's part in it."""

    tokens: float
    """Fed to the trunk; a shared prompt counts once, padding like any other."""
    squares: float
    """Sum over the rows of attention of their length squared."""
    scored: float
    """Positions where the head runs."""


def sizes(document: Document, packed: bool) -> Sizes:
    """Of a document by itself, without padding."""
    rows = [len(document)]
    if not packed:
        rows = [len(document.prompt) + len(b) - 1 for b in document.branches]
    return Sizes(sum(rows), sum(n * n for n in rows), sum(map(len, document.targets())))


def pass_sizes(documents: Seq[Document], *, packed: bool, length: int | None = None) -> Sizes:
    """Of documents in one forward pass, as `layout.pack` and `layout.pad` lay them out.

    Args:
        length: tokens to which a pack is padded; its padding attends to itself, like one more document.
    """
    parts = [sizes(document, packed) for document in documents]
    scored = sum(part.scored for part in parts)
    if packed:
        tokens = sum(part.tokens for part in parts)
        padding = max(length - tokens, 0) if length else 0
        return Sizes(tokens + padding, sum(part.squares for part in parts) + padding**2, scored)
    rows = [len(d.prompt) + len(b) - 1 for d in documents for b in d.branches]
    return padded_sizes(rows, scored)


def padded_sizes(rows: Seq[int], scored: float) -> Sizes:
    """Of rows of these lengths in one forward pass: all are as long as the longest."""
    width = max(rows)
    return Sizes(len(rows) * width, len(rows) * width**2, scored)


def forward(shape: Shape, tokens: float, squares: float, scored: float) -> float:
    """Operations of a forward pass.

    Args:
        tokens: T, of all rows or packs together; a shared prompt counts once.
        squares: sum over the rows of attention of their length squared.
        scored: N.
    """
    return 2 * shape.trunk * tokens + _attention(shape, squares) + 2 * shape.head * scored


def training(
    shape: Shape,
    tokens: float,
    squares: float,
    scored: float,
    *,
    checkpointing: bool = False,
    head_again: bool = False,
) -> float:
    """Operations of forward and backward; frozen weights pass the gradient on and get none.

    Args:
        checkpointing: the layers run forward once more in the backward pass.
        head_again: so does the head (see `keeps_logits`).
    """
    attention = _attention(shape, squares)
    trunk, head = 6 * shape.trunk - 2 * shape.frozen_trunk, 6 * shape.head - 2 * shape.frozen_head
    total = trunk * tokens + (1 + _ATTENTION_BACKWARD) * attention + head * scored
    if checkpointing:
        total += 2 * shape.trunk * tokens + attention
    return total + (2 * shape.head * scored if head_again else 0)


def keeps_logits(tokens: int, vocabulary: int) -> bool:
    """Whether the forward pass keeps what the backward pass needs of so many tokens' logits."""
    return tokens * vocabulary * 4 <= KEEP_LOGITS_BYTES


def generation(shape: Shape, prompts: Iterable[int], new: float) -> float:
    """Operations of sampling `new` tokens after each prompt (lengths), with a cache of keys and values.

    The token sampled last is not fed, and the head runs once a sampled token.
    """
    total = 0.0
    for prompt in prompts:
        # The k-th of the new tokens that are fed looks at prompt + k positions.
        seen = prompt**2 + (new - 1) * prompt + new * (new - 1) / 2
        total += forward(shape, prompt + new - 1, seen, new)
    return total


def sampling(shape: Shape, drawn: Iterable[tuple[int, int]]) -> float:
    """Operations of sampling completions of any lengths: (tokens of the prompt, tokens drawn) of each.

    Without the padding of prompts that are sampled together: neighbours in length share a batch.
    """
    return sum(generation(shape, [prompt], new) for prompt, new in drawn)


def _attention(shape: Shape, squares: float) -> float:
    return 4 * shape.layers * shape.attention * squares
