"""Text metrics on hand-made text, and KL estimates against an exact KL."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpo_core.text_metrics import distinct_n, kl_estimates, mean_response_length


def test_distinct_n_is_pooled_and_does_not_span_responses() -> None:
    responses = [["a", "b", "a"], ["a", "b", "c"]]
    assert distinct_n(responses, 1, length=10) == 3 / 6
    assert distinct_n(responses, 2, length=10) == 3 / 4  # ab ba ab bc
    assert distinct_n(responses, 3, length=10) == 1.0
    assert distinct_n(responses, 4, length=10) == 0.0
    assert distinct_n([], 1, length=10) == 0.0


def test_distinct_n_is_measured_at_a_common_length() -> None:
    short, long = [[1, 2, 3, 4]], [[1, 2, 3, 4, 1, 2, 3, 4]]
    assert distinct_n(short, 1, length=100) == 1.0
    assert distinct_n(long, 1, length=100) == 0.5
    assert distinct_n(long, 1, length=4) == distinct_n(short, 1, length=4) == 1.0


@given(st.lists(st.lists(st.integers(0, 5), max_size=12), max_size=6), st.integers(1, 3), st.integers(1, 12))
def test_distinct_n_bounds(responses: list[list[int]], n: int, length: int) -> None:
    share = distinct_n(responses, n, length=length)
    assert 0 <= share <= 1
    assert distinct_n(responses + responses, n, length=length) == pytest.approx(share / 2)


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="n=0"):
        distinct_n([[1]], 0, length=3)
    with pytest.raises(ValueError, match="no responses"):
        mean_response_length([])


def test_mean_response_length() -> None:
    assert mean_response_length([[1, 2, 3], [], [1, 2, 3]]) == 2.0


def test_kl_estimates_by_hand() -> None:
    policy = torch.tensor([[-1.0, -2.0, math.nan], [-1.0, -1.0, -1.0]])
    ref = torch.tensor([[-2.0, -1.5, math.nan], [-1.0, -1.0, -1.0]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    kl = kl_estimates(policy, ref, mask)
    assert kl["k1"].tolist() == pytest.approx([0.5, 0.0])
    assert kl["k3"].tolist() == pytest.approx([math.exp(-1) + math.exp(0.5) - 2 - (-1 + 0.5), 0.0])


def test_kl_estimates_are_unbiased_for_sampled_sequences() -> None:
    """Sequences of 5 independent tokens: the sequence KL is 5 times that of one token."""
    generator = torch.Generator().manual_seed(0)
    p = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    q = torch.tensor([0.3, 0.4, 0.3], dtype=torch.float64)
    exact = 5 * (p * (p / q).log()).sum().item()
    ids = torch.multinomial(p, 5 * 40_000, replacement=True, generator=generator).reshape(40_000, 5)
    kl = kl_estimates(p.log()[ids], q.log()[ids], torch.ones_like(ids, dtype=torch.bool))
    for name in ("k1", "k3"):
        standard_error = kl[name].std().item() / math.sqrt(40_000)
        assert abs(kl[name].mean().item() - exact) < 4 * standard_error
    assert (kl["k1"] < 0).any()
    assert (kl["k3"] >= 0).all()
    assert kl["k3"].std() < kl["k1"].std()
