"""Closed forms of DPO and its nearest relatives, in float64; see also `test_every_objective`."""

import math

import pytest
import torch
from torch import Tensor

from dpo_core.objectives import PairLogps, get, pair_metrics

BETA, EPSILON, TAU = 0.3, 0.1, 0.1


def pairs(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor | None = None) -> PairLogps:
    zeros = torch.zeros_like(chosen.detach())
    return PairLogps(
        chosen_B=chosen,
        rejected_B=rejected,
        ref_chosen_B=zeros if ref_chosen is None else ref_chosen,
        ref_rejected_B=zeros,
        chosen_tokens_B=torch.full(chosen.shape, 4),
        rejected_tokens_B=torch.full(chosen.shape, 9),
    )


def test_hand_computed_values_with_all_four_log_probs() -> None:
    def one(x: float) -> Tensor:
        return torch.tensor([x], dtype=torch.float64)

    logps = PairLogps(one(-10.0), one(-14.0), one(-12.0), one(-13.0), torch.tensor([4]), torch.tensor([5]))
    # h_w = 2, h_l = -1, D = 3
    assert get("dpo").function(logps, beta=0.5).item() == pytest.approx(math.log1p(math.exp(-1.5)))
    assert get("ipo_sum").function(logps, tau=0.25).item() == pytest.approx(1.0)
    assert get("ipo_mean").function(logps, tau=0.25).item() == pytest.approx((0.5 + 0.2 - 2.0) ** 2)
    assert get("hinge").function(logps, beta=0.25).item() == pytest.approx(0.25)


def test_metrics() -> None:
    chosen = torch.tensor([-10.0, -10.0, -10.0], dtype=torch.float64, requires_grad=True)
    logps = pairs(chosen, torch.tensor([-14.0, -10.0, -9.0], dtype=torch.float64))
    metrics = pair_metrics(logps, beta=0.5)
    assert {key: value.tolist() for key, value in metrics.items()} == {
        "rewards/chosen": [-5.0, -5.0, -5.0],
        "rewards/rejected": [-7.0, -5.0, -4.5],
        "rewards/margins": [2.0, 0.0, -0.5],
        "rewards/accuracies": [1.0, 0.0, 0.0],  # a tie counts 0
        "logps/chosen": [-10.0, -10.0, -10.0],
        "logps/rejected": [-14.0, -10.0, -9.0],
    }
    assert not any(value.requires_grad for value in metrics.values())


def test_shapes_that_would_broadcast_are_refused() -> None:
    with pytest.raises(ValueError, match="ref_chosen_B has shape"):
        pairs(torch.zeros(3), torch.zeros(3), ref_chosen=torch.zeros(3, 1))
    with pytest.raises(ValueError, match="rejected_B has shape"):
        pairs(torch.zeros(3), torch.zeros(1))


def test_narrow_log_probs_are_refused() -> None:
    with pytest.raises(ValueError, match="bfloat16"):
        pairs(torch.zeros(3, dtype=torch.bfloat16), torch.zeros(3))
