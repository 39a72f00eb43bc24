"""Documents (a prompt with its completions) and micro-batches of them, as token ids without tensors."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from dpo_core.data.tokens.sequences import TokenSequence


@dataclass(frozen=True)
class Document:
    """A prompt and the completions that share it, none empty. Its length is the tokens fed to the model."""

    prompt: tuple[int, ...]
    branches: tuple[tuple[int, ...], ...]
    learnt: tuple[tuple[bool, ...] | None, ...] | None = None
    """Which tokens of each branch are predicted, at least one; None: all. The rest is context only."""

    @classmethod
    def of(cls, *sequences: "TokenSequence") -> "Document":
        """The document of completions of one prompt."""
        masks = tuple(s.learnt for s in sequences)
        completions = tuple(s.completion for s in sequences)
        return cls(sequences[0].prompt, completions, None if all(m is None for m in masks) else masks)

    def targets(self) -> list[NDArray[np.int64]]:
        """Indices (n,) of the predicted tokens in each branch."""
        masks = self.learnt or (None,) * len(self.branches)
        return [
            np.arange(len(tokens)) if mask is None else np.flatnonzero(mask)
            for tokens, mask in zip(self.branches, masks, strict=True)
        ]

    def __len__(self) -> int:
        return len(self.prompt) + sum(len(branch) - 1 for branch in self.branches)


@dataclass(frozen=True)
class MicroBatch:
    """Documents of one forward pass."""

    documents: list[Document]
    packed: bool
    """In one pack (`layout.pack`); otherwise in padded rows (`layout.pad`)."""

    @property
    def targets(self) -> int:
        """Predicted tokens."""
        return sum(len(places) for document in self.documents for places in document.targets())
