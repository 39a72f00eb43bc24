"""Counts floating-point operations of training and sampling from a model's shape and token counts.

A matrix weight costs 2 operations a token forward and 4 backward (Kaplan et al. 2020, "6N"); scores and
mixing of attention cost 4 times the attention's width for each pair of positions and layer. Pairs of
positions are counted as kernels with a mask compute them: the full square of a row. Norms and activations
are not counted.

Shapes: T tokens fed, N scored positions (where the output head runs).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from dpo_core.scoring.document import Document

# Backward of attention: four products of the size of forward's two; the scores are kept from forward.
_ATTENTION_BACKWARD = 2
KEEP_LOGITS_BYTES = 1 << 29
"""Logits above this size are recomputed in the backward pass; smaller ones are kept, a quarter faster."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that decide its cost."""

    parameters: int
    """All parameters, tied ones counted once."""
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
    """Those of the trunk's weights that are not trained: they need no weight gradient."""
    frozen_head: int = 0
    """The same of the output head."""

    def as_reward_model(self) -> "Shape":
        """The same trunk with a scalar head."""
        return replace(self, head=self.head // self.vocabulary, vocabulary=1)


class Sizes(NamedTuple):
    """The quantities that decide the cost of a forward pass, or a document's share of them."""

    tokens: float
    """Tokens fed to the trunk: a shared prompt counts once, padding counts too."""
    squares: float
    """Sum over the rows of attention of their length squared."""
    scored: float
    """Positions where the head runs."""


def sizes(document: Document, packed: bool) -> Sizes:
    """Sizes of a single document, without padding."""
    rows = [len(document)]
    if not packed:
        rows = [len(document.prompt) + len(b) - 1 for b in document.branches]
    return Sizes(sum(rows), sum(n * n for n in rows), sum(map(len, document.targets())))


def pass_sizes(documents: Sequence[Document], *, packed: bool, length: int | None = None) -> Sizes:
    """Sizes of documents in one forward pass, laid out by `layout.pack` or `layout.pad`.

    Args:
        length: tokens to which a pack is padded; the padding attends to itself, like one more document.
    """
    parts = [sizes(document, packed) for document in documents]
    scored = sum(part.scored for part in parts)
    if packed:
        tokens = sum(part.tokens for part in parts)
        padding = max(length - tokens, 0) if length else 0
        return Sizes(tokens + padding, sum(part.squares for part in parts) + padding**2, scored)
    rows = [len(d.prompt) + len(b) - 1 for d in documents for b in d.branches]
    return padded_sizes(rows, scored)


def padded_sizes(rows: Sequence[int], scored: float) -> Sizes:
    """Sizes of rows in one forward pass, padded to the longest."""
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
    recompute_head: bool = False,
) -> float:
    """Operations of forward and backward; frozen weights pass gradients through and get none.

    Args:
        checkpointing: the layers are recomputed in the backward pass.
        recompute_head: so is the head (see `keeps_logits`).
    """
    attention = _attention(shape, squares)
    trunk, head = 6 * shape.trunk - 2 * shape.frozen_trunk, 6 * shape.head - 2 * shape.frozen_head
    total = trunk * tokens + (1 + _ATTENTION_BACKWARD) * attention + head * scored
    if checkpointing:
        total += 2 * shape.trunk * tokens + attention
    return total + (2 * shape.head * scored if recompute_head else 0)


def keeps_logits(tokens: int, vocabulary: int) -> bool:
    """Whether the logits of so many tokens are kept for the backward pass rather than recomputed."""
    return tokens * vocabulary * 4 <= KEEP_LOGITS_BYTES


def generation(shape: Shape, prompts: Iterable[int], new: float) -> float:
    """Operations of sampling `new` tokens after each prompt (lengths), with a KV cache.

    The last sampled token is not fed, and the head runs once per sampled token.
    """
    total = 0.0
    for prompt in prompts:
        # The k-th new token that is fed attends to prompt + k positions.
        squares = prompt**2 + (new - 1) * prompt + new * (new - 1) / 2
        total += forward(shape, prompt + new - 1, squares, new)
    return total


def sampling(shape: Shape, drawn: Iterable[tuple[int, int]]) -> float:
    """Operations of sampling completions of any lengths: (prompt tokens, sampled tokens) of each.

    Padding is not counted: prompts of similar length share a batch.
    """
    return sum(generation(shape, [prompt], new) for prompt, new in drawn)


def _attention(shape: Shape, squares: float) -> float:
    return 4 * shape.layers * shape.attention * squares
