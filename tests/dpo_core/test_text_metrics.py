"""Text metrics on hand-made text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_core.text_metrics import distinct_n


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
