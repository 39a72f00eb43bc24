"""Lays out prompts and completions in tensors: packs with each prompt once, or a padded row per completion.

A document is a prompt followed by its branches (chosen and rejected, or one completion). In a pack:

    tokens     p0 p1 p2 | c0 c1 | r0 r1 r2 | next document ...
    positions   0  1  2    3  4    3  4  5    0 ...
    branch      0  0  0    1  1    2  2  2    0 ...

A token sees the earlier tokens of its document that are in the prompt or in its own branch, so that each
completion reads exactly what it would read alone. Both first tokens are predicted from the last prompt token,
which therefore needs no copy; the last token of a branch predicts nothing and is not fed.

Shapes: T tokens of a pack, N predicted tokens, S branches of all D documents, L tokens of the longest branch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpo_core.scoring.document import Document, MicroBatch

_Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Layout:
    """The scored tokens, in both layouts. Indices count the tokens of all rows end to end."""

    predicts_N: Tensor
    """Index of the token whose hidden state predicts."""
    targets_N: Tensor
    """The token to predict."""
    index_N: tuple[Tensor, Tensor]
    """Branch of each predicted token, and its index among the branch's predicted tokens."""
    lengths_S: Tensor
    """Predicted tokens of each branch; documents in order, their branches in order."""
    prompt_predicts_M: Tensor
    """The same for the prompts' own tokens from the second on, for objectives that score prompts."""
    prompt_targets_M: Tensor
    prompt_document_M: Tensor
    prompt_lengths_D: Tensor
    """Tokens of each document's prompt."""

    def table(self, values_N: Tensor) -> Tensor:
        """(S, L): the values of each branch in its row, 0 after its end. Differentiable."""
        shape = len(self.lengths_S), int(self.index_N[1].max()) + 1
        return values_N.new_zeros(shape).index_put(self.index_N, values_N)

    def to(self, device: torch.device | str) -> Self:
        """The same layout on another device."""
        return type(self)(**{name: _moved(value, device) for name, value in vars(self).items()})


@dataclass(frozen=True)
class Pack(Layout):
    """One row of T tokens."""

    ids_T: Tensor
    positions_T: Tensor
    document_T: Tensor
    """Number of the document of each token; padding counts as one more document."""
    branch_T: Tensor
    """0 in a prompt, k in the k-th branch of its document."""


@dataclass(frozen=True)
class PaddedRows(Layout):
    """S rows of T tokens, right-padded: every branch with its own copy of the prompt."""

    ids_ST: Tensor
    attention_ST: Tensor


def _moved(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, tuple):
        return tuple(_moved(part, device) for part in value)
    return value.to(device) if isinstance(value, Tensor) else value


def lay_out(micro_batch: MicroBatch) -> Layout:
    """A micro-batch as tensors.

    Raises:
        ValueError: a prompt or a branch is empty.
    """
    return (pack if micro_batch.packed else pad)(micro_batch.documents)


def pack(documents: Sequence[Document], pad_to: int | None = None) -> Pack:
    """Concatenate documents, padded to `pad_to` tokens if a fixed shape is needed.

    Raises:
        ValueError: a prompt or a branch is empty, or the documents are longer than `pad_to`.
    """
    _require_tokens(documents)
    ids: list[int] = []
    positions: list[_Indices] = []
    branch: list[_Indices] = []
    predicts: list[_Indices] = []
    starts: list[int] = []
    for document in documents:
        start, end = len(ids), len(document.prompt)
        starts.append(start)
        ids.extend(document.prompt)
        positions.append(np.arange(end))
        branch.append(np.zeros(end, np.int64))
        for k, (tokens, targets) in enumerate(zip(document.branches, document.targets(), strict=True), 1):
            fed = len(tokens) - 1
            # The last prompt token predicts the first token of each branch, the branch's own tokens the rest.
            predicts.append(np.r_[start + end - 1, np.arange(len(ids), len(ids) + fed)][targets])
            ids.extend(tokens[:-1])
            positions.append(np.arange(end, end + fed))
            branch.append(np.full(fed, k))
    padding = 0 if pad_to is None else pad_to - len(ids)
    if padding < 0:
        raise ValueError(f"{len(ids)} tokens do not fit in a pack of {pad_to}")
    owner = np.repeat(np.arange(len(documents) + 1), [*(len(d) for d in documents), padding])
    return Pack(
        **_scored(documents, predicts, starts),
        ids_T=torch.tensor(ids + [0] * padding),
        positions_T=_tensor([*positions, np.arange(padding)]),
        document_T=torch.from_numpy(owner),
        branch_T=_tensor([*branch, np.zeros(padding, np.int64)]),
    )


def pad(documents: Sequence[Document]) -> PaddedRows:
    """One row per branch, each with its prompt.

    Raises:
        ValueError: a prompt or a branch is empty.
    """
    _require_tokens(documents)
    ids_ST, attention_ST = right_padded([d.prompt + tokens[:-1] for d in documents for tokens in d.branches])
    width = ids_ST.shape[1]
    predicts: list[_Indices] = []
    starts: list[int] = []
    row = 0
    for document in documents:
        starts.append(row * width)
        for targets in document.targets():
            predicts.append(row * width + len(document.prompt) - 1 + targets)
            row += 1
    return PaddedRows(**_scored(documents, predicts, starts), ids_ST=ids_ST, attention_ST=attention_ST)


def right_padded(rows: Sequence[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
    """Ids and attention mask (S,T) of token rows. The padding id is arbitrary: only the masks count."""
    ids_ST = torch.zeros((len(rows), max(map(len, rows))), dtype=torch.long)
    attention_ST = torch.zeros_like(ids_ST)
    for row, tokens in enumerate(rows):
        ids_ST[row, : len(tokens)] = torch.tensor(tokens)
        attention_ST[row, : len(tokens)] = 1
    return ids_ST, attention_ST


def _require_tokens(documents: Sequence[Document]) -> None:
    if not all(d.prompt and d.branches and all(d.branches) and all(map(len, d.targets())) for d in documents):
        raise ValueError("a document needs a prompt and completions of at least one predicted token")


def _scored(documents: Sequence[Document], predicts: list[_Indices], starts: list[int]) -> dict[str, Any]:
    """The fields that both layouts share; `starts` is the index of each document's (first) prompt."""
    branches = [tokens for document in documents for tokens in document.branches]
    targets = [places for document in documents for places in document.targets()]
    lengths = np.array([len(places) for places in targets])
    inner = [len(d.prompt) - 1 for d in documents]
    return {
        "predicts_N": _tensor(predicts),
        "targets_N": _tensor(
            [np.array(tokens)[places] for tokens, places in zip(branches, targets, strict=True)]
        ),
        "index_N": (
            torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)),
            _tensor([np.arange(n) for n in lengths]),
        ),
        "lengths_S": torch.from_numpy(lengths),
        "prompt_predicts_M": _tensor([s + np.arange(n) for s, n in zip(starts, inner, strict=True)]),
        "prompt_targets_M": torch.tensor([t for d in documents for t in d.prompt[1:]], dtype=torch.long),
        "prompt_document_M": torch.from_numpy(np.repeat(np.arange(len(documents)), inner)),
        "prompt_lengths_D": torch.tensor([len(d.prompt) for d in documents]),
    }


def _tensor(pieces: Sequence[_Indices]) -> Tensor:
    return torch.from_numpy(np.concatenate(pieces).astype(np.int64))
