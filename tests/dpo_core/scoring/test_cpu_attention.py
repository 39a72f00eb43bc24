"""Attention by document in bf16, forward and backward, against plain fp32 attention under the dense mask."""

import numpy as np
import pytest
import torch
from torch import Tensor

from dpo_core.scoring.attention import packed_hidden
from dpo_core.scoring.autocast import autocast
from dpo_core.scoring.branch_scores import branch_scores
from dpo_core.scoring.cpu_attention import Bf16Attention, DocumentParts
from dpo_core.scoring.layout import Pack, pack
from tests.dpo_core.scoring.test_layout import dense_mask, documents, llama


def plain(query_THd: Tensor, key_TKd: Tensor, value_TKd: Tensor, layout: Pack, scale: float) -> Tensor:
    groups = query_THd.shape[1] // key_TKd.shape[1]
    key_THd, value_THd = (tensor.repeat_interleave(groups, dim=1) for tensor in (key_TKd, value_TKd))
    scores_HTT = torch.einsum("qhd,khd->hqk", query_THd, key_THd) * scale
    hidden_TT = torch.from_numpy(~dense_mask(layout))
    return torch.einsum(
        "hqk,khd->qhd", scores_HTT.masked_fill(hidden_TT, float("-inf")).softmax(-1), value_THd
    )


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
def test_values_and_gradients_are_near_those_of_fp32(heads, kv_heads):
    torch.manual_seed(0)
    layout = pack(documents(7, seed=3, longest=40), pad_to=512)
    tokens = len(layout.ids_T)
    # As models make them: (heads, T, d) in memory, and in fp32 after the rotation of positions.
    states = [torch.randn(n, tokens, 16).bfloat16().float() for n in (heads, kv_heads, kv_heads)]
    weights_THd = torch.randn(tokens, heads, 16)
    results = []
    for attend in (lambda *rows: Bf16Attention.apply(*rows, DocumentParts.of(layout), 0.25), plain):
        leaves = [tensor.clone().requires_grad_() for tensor in states]
        rows = [tensor.transpose(0, 1) for tensor in leaves]
        out = attend(*rows) if attend is not plain else plain(*rows, layout, 0.25)
        (out.float() * weights_THd).sum().backward()
        results.append([out.detach().float(), *(leaf.grad for leaf in leaves)])
    assert results[0][0].shape == (tokens, heads, 16)
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).norm() <= 0.006 * theirs.norm()
        assert (ours - theirs).abs().max() <= 0.03 * theirs.abs().max()


@pytest.mark.usefixtures("real_bf16")
def test_a_model_under_autocast_is_near_itself_in_fp32_and_reads_nothing_it_may_not_see():
    chosen = documents(9, seed=5, longest=30)
    weights = torch.from_numpy(np.random.default_rng(0).normal(size=(18, 30))).float()

    def run(precision: str) -> tuple[Tensor, Tensor]:
        model = llama()
        with autocast(precision):
            logps_SL = branch_scores(model, pack(chosen)).logps_SL
        (logps_SL * weights[:, : logps_SL.shape[1]]).sum().backward()
        return logps_SL.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])

    (exact, exact_grad), (near, near_grad) = run("fp32"), run("bf16")
    assert not near.equal(exact)
    torch.testing.assert_close(near, exact, rtol=0, atol=0.05)
    assert (near_grad - exact_grad).norm() <= 0.01 * exact_grad.norm()

    layout = pack(chosen)
    with torch.no_grad(), autocast("bf16"):
        before = packed_hidden(llama(), layout)
        layout.ids_T[layout.document_T == 4] = 1
        after = packed_hidden(llama(), layout)
    other = layout.document_T != 4
    assert after[other].equal(before[other])
    assert not after[~other].equal(before[~other])
