"""Text metrics on hand-made text."""

import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_core.errors import StageFailed
from dpo_core.statistics.text import distinct_n, self_bleu


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


def test_self_bleu_of_equal_and_of_unrelated_answers() -> None:
    equal = ["the film was a delight from its first scene"] * 3
    unrelated = ["one two three four five", "six seven eight nine ten"]
    assert self_bleu([equal, unrelated]) == pytest.approx([1.0, 0.0], abs=1e-9)
    assert self_bleu([]) == []


def test_self_bleu_by_hand() -> None:
    """Of six words 5 match, of five bigrams 3, of four trigrams 2, of three 4-grams 1; equal lengths."""
    texts = ["the cat sat on the mat", "the cat sat on a mat"]
    assert self_bleu([texts]) == pytest.approx([(5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25])


few_words = st.lists(st.sampled_from(["a", "good", "film", "bad", "plot", "."]), min_size=1, max_size=9)


@given(st.lists(few_words.map(" ".join), min_size=2, max_size=5))
@settings(max_examples=40)
def test_self_bleu_is_the_mean_of_sacrebleu_of_each_answer_against_the_rest(texts: list[str]) -> None:
    metric = sacrebleu.BLEU(effective_order=True)
    reference = [
        metric.sentence_score(text, [t for j, t in enumerate(texts) if j != i]).score
        for i, text in enumerate(texts)
    ]
    (score,) = self_bleu([texts])
    assert score == pytest.approx(sum(reference) / len(reference) / 100)
    assert 0 <= score <= 1
    assert self_bleu([texts[::-1]]) == pytest.approx([score]), "the order of the answers does not matter"


def test_self_bleu_needs_two_answers() -> None:
    with pytest.raises(StageFailed, match="prompt 2 of 2 has 1 answer"):
        self_bleu([["a", "b"], ["a"]])
