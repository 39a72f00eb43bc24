"""Attention of packs (see `layout`) on a CPU: document by document, with bf16 matrix products.

The CPU's fused kernels are slower in bf16 than plain products, and autograd of plain products spends as long
on slicing, joining and repeating tensors as on the products. So forward and backward are written by hand:
each document is read from and written to its place in the pack, and the queries that share a key-value head
are rows of one product, so that keys and values are not repeated.

Numbers are rounded where FlashAttention rounds: scores and softmax are fp32, probabilities and gradients of
scores enter their products as bf16.

Shapes: T tokens of a pack, L of a document, H query heads, K key-value heads, G = H / K, d size of a head (e
of the values' heads, where they differ).
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dpo_core.scoring.layout import Pack


@dataclass(frozen=True)
class DocumentParts:
    """The documents of a pack, and which tokens attend to which in each."""

    lengths: tuple[int, ...]
    """Tokens of each document; padding is one more document."""
    biases: tuple[Tensor, ...]
    """(L, L) of each document, added to the scores: 0 where a query sees a key, else minus infinity."""
    positions: tuple[Tensor, ...]
    """(L,) of each document: the position of each token in its branch, prompt included."""
    windows: dict[int, "DocumentParts"] = field(default_factory=dict, compare=False)
    """The same parts under the windows of the model's layers, computed on first use."""

    @classmethod
    def of(cls, pack: Pack) -> "DocumentParts":
        lengths = torch.bincount(pack.document_T).tolist()
        biases = tuple(_bias(branch_L) for branch_L in pack.branch_T.split(lengths))
        return cls(tuple(lengths), biases, tuple(pack.positions_T.split(lengths)))

    def within(self, window: int | None) -> "DocumentParts":
        """The same parts where a query sees only the last `window` positions, its own included."""
        if not window or window >= max(self.lengths):
            return self
        if window not in self.windows:
            biases = tuple(
                bias_LL.masked_fill(p_L[:, None] - p_L[None, :] >= window, float("-inf"))
                for bias_LL, p_L in zip(self.biases, self.positions, strict=True)
            )
            self.windows[window] = DocumentParts(self.lengths, biases, self.positions)
        return self.windows[window]

    def slices(self) -> list[slice]:
        """The tokens of each document."""
        slices, end = [], 0
        for length in self.lengths:
            slices.append(slice(end, end := end + length))
        return slices


def _bias(branch_L: Tensor) -> Tensor:
    q, k = branch_L[:, None], branch_L[None, :]
    visible_LL = ((k == 0) | (k == q)).tril()
    return torch.zeros(visible_LL.shape, device=visible_LL.device).masked_fill(~visible_LL, float("-inf"))


class Bf16Attention(torch.autograd.Function):
    """`apply(query_THd, key_TKd, value_TKe, parts, scale)`: (T, H, e) in bf16, of inputs of any type."""

    @staticmethod
    def forward(
        ctx: Any, query_THd: Tensor, key_TKd: Tensor, value_TKe: Tensor, parts: DocumentParts, scale: float
    ) -> Tensor:
        query_THd, key_TKd, value_TKe = (tensor.bfloat16() for tensor in (query_THd, key_TKd, value_TKe))
        heads = key_TKd.shape[1]
        out_THe = query_THd.new_empty(*query_THd.shape[:2], value_TKe.shape[2])
        probs = []
        for document, bias_LL in zip(parts.slices(), parts.biases, strict=True):
            query_KRd = _rows(query_THd[document], heads)
            key_KLd, value_KLe = (tensor[document].transpose(0, 1) for tensor in (key_TKd, value_TKe))
            scores_KRL = torch.bmm(query_KRd.float() * scale, key_KLd.float().transpose(1, 2))
            scores_KRL.view(heads, -1, *bias_LL.shape).add_(bias_LL)
            probs_KRL = torch.softmax(scores_KRL, -1).bfloat16()
            out_THe[document] = _tokens(torch.bmm(probs_KRL, value_KLe), len(bias_LL))
            probs.append(probs_KRL)
        ctx.save_for_backward(query_THd, key_TKd, value_TKe, out_THe, *probs)
        ctx.parts, ctx.scale = parts, scale
        return out_THe

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query_THd, key_TKd, value_TKe, out_THe, *probs = ctx.saved_tensors
        d_out_THe = gradients[0].bfloat16()
        heads = key_TKd.shape[1]
        d_query_THd, d_key_TKd, d_value_TKe = (
            torch.empty_like(tensor, memory_format=torch.contiguous_format)
            for tensor in (query_THd, key_TKd, value_TKe)
        )
        # Row sums of dP * P without P: they equal the row sums of dO * O.
        sums_TH1 = (d_out_THe.float() * out_THe.float()).sum(-1, keepdim=True)
        for document, probs_KRL in zip(ctx.parts.slices(), probs, strict=True):
            length = document.stop - document.start
            query_KRd, d_out_KRe, sums_KR1 = (
                _rows(tensor[document], heads) for tensor in (query_THd, d_out_THe, sums_TH1)
            )
            key_KLd, value_KLe = (tensor[document].transpose(0, 1) for tensor in (key_TKd, value_TKe))
            d_value_TKe[document] = torch.bmm(probs_KRL.transpose(1, 2), d_out_KRe).transpose(0, 1)
            d_scores_KRL = torch.bmm(d_out_KRe, value_KLe.transpose(1, 2)).float().sub_(sums_KR1)
            d_scores_KRL = d_scores_KRL.mul_(probs_KRL).mul_(ctx.scale).bfloat16()
            d_query_THd[document] = _tokens(torch.bmm(d_scores_KRL, key_KLd), length)
            d_key_TKd[document] = torch.bmm(d_scores_KRL.transpose(1, 2), query_KRd).transpose(0, 1)
        return d_query_THd, d_key_TKd, d_value_TKe, None, None


def _rows(heads_LHd: Tensor, kv_heads: int) -> Tensor:
    """(K, G * L, d): the rows of all query heads that read one key-value head."""
    length, _, size = heads_LHd.shape
    return heads_LHd.view(length, kv_heads, -1, size).permute(1, 2, 0, 3).reshape(kv_heads, -1, size)


def _tokens(rows_KRd: Tensor, length: int) -> Tensor:
    """(L, H, d): back from `_rows`."""
    heads, _, size = rows_KRd.shape
    return rows_KRd.view(heads, -1, length, size).permute(2, 0, 1, 3).flatten(1, 2)
