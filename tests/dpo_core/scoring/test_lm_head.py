"""The output head's own backward pass against autograd of the plain formula."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dpo_core.scoring import flops as cost
from dpo_core.scoring import lm_head as head
from dpo_core.scoring.lm_head import target_logps

V, H, N = 97, 24, 13


class Headed(nn.Module):
    """Nothing but an output head."""

    def __init__(self, bias: bool = False, scale: float = 1.0) -> None:
        super().__init__()
        self.config = SimpleNamespace()
        self.lm_head = nn.Linear(H, V, bias=bias)
        nn.init.normal_(self.lm_head.weight, std=scale)

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head


def made(**settings: Any) -> tuple[Headed, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden_NH = torch.randn(N, H, requires_grad=True)
    return Headed(**settings), hidden_NH, torch.randint(V, (N,)), torch.randn(N)


def plain(model: Headed, hidden_NH: Tensor, targets_N: Tensor, temperature: float = 1.0) -> Tensor:
    logps_NV = torch.log_softmax(model.lm_head(hidden_NH) / temperature, -1)
    return logps_NV.gather(-1, targets_N[:, None])[:, 0]


def both(function: Any, model: Headed, hidden_NH: Tensor, weights_N: Tensor, *rest: Any) -> list[Tensor]:
    """Values, and the gradients of their weighted sum in hidden states and weights."""
    model.zero_grad()
    hidden_NH.grad = None
    values_N = function(model, hidden_NH, *rest)
    (values_N * weights_N).sum().backward()
    assert hidden_NH.grad is not None
    return [values_N.detach(), hidden_NH.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("keep", [True, False])
def test_values_and_gradients_are_those_of_autograd(bias, temperature, keep, monkeypatch):
    model, hidden_NH, targets_N, weights_N = made(bias=bias)
    monkeypatch.setattr(head, "CHUNK_TOKENS", 5)
    monkeypatch.setattr(cost, "KEEP_LOGITS_BYTES", 1 << 29 if keep else 0)
    ours = both(target_logps, model, hidden_NH, weights_N, targets_N, temperature)
    theirs = both(plain, model, hidden_NH, weights_N, targets_N, temperature)
    assert len(ours) == len(theirs) == 3 + bias
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_under_autocast_values_are_exact_and_gradients_near():
    """Also where the model is sure of its tokens, so that 1 - p is far below what bf16 tells from zero."""
    model, hidden_NH, _, weights_N = made(scale=4.0)
    targets_N = (hidden_NH @ model.lm_head.weight.T).argmax(-1)
    exact = both(target_logps, model, hidden_NH, weights_N, targets_N)
    assert exact[0].exp().median() > 0.9
    with torch.autocast("cpu", torch.bfloat16):
        near = both(target_logps, model, hidden_NH, weights_N, targets_N)
    assert near[0].equal(exact[0])
    assert near[0].dtype == torch.float32
    assert not near[1].equal(exact[1])
    for one, other in zip(near[1:], exact[1:], strict=True):
        assert (one - other).norm() <= 0.005 * other.norm()
    # Each row by itself: that of a token with p = 0.999 must not drown in the rounding of p.
    gaps_N = (near[1] - exact[1]).norm(dim=-1) / exact[1].norm(dim=-1)
    assert gaps_N.max() <= 0.02


def test_a_second_backward_pass_gives_the_same():
    model, hidden_NH, targets_N, weights_N = made()
    loss = (target_logps(model, hidden_NH, targets_N) * weights_N).sum()
    first, again = (torch.autograd.grad(loss, hidden_NH, retain_graph=True)[0] for _ in range(2))
    assert first.equal(again)


def test_a_frozen_head_and_no_tokens():
    model, hidden_NH, targets_N, _ = made()
    model.requires_grad_(False)
    target_logps(model, hidden_NH, targets_N).sum().backward()
    assert model.lm_head.weight.grad is None
    assert hidden_NH.grad is not None
    assert hidden_NH.grad.abs().sum() > 0
    assert target_logps(model, hidden_NH[:0], targets_N[:0]).shape == (0,)
    with torch.no_grad():
        assert not target_logps(model, hidden_NH, targets_N).requires_grad
