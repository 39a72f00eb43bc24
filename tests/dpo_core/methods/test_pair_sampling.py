"""Tests how pairs are made from scored samples."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from dpo_core.methods.pair_sampling import PairSamplingConfig, ScoredSample, pair_up


def samples(*rewards: float) -> list[ScoredSample]:
    return [ScoredSample(f"text {i}", True, reward) for i, reward in enumerate(rewards)]


def texts(pairs: list[tuple[ScoredSample, ScoredSample]]) -> set[tuple[str, str]]:
    return {(better.text, worse.text) for better, worse in pairs}


def test_all_pairs_by_hand() -> None:
    pairs, ties = pair_up(samples(0.1, 0.9, 0.5), PairSamplingConfig())
    assert texts(pairs) == {("text 1", "text 2"), ("text 1", "text 0"), ("text 2", "text 0")}
    assert ties == 0


def test_the_extreme_pairs_by_hand() -> None:
    pairs, ties = pair_up(samples(0.1, 0.9, 0.5), PairSamplingConfig(pairing="extremes"))
    assert texts(pairs) == {("text 1", "text 0")}
    assert ties == 0


def test_a_gap_that_is_not_larger_than_the_least_one_is_a_tie() -> None:
    config = PairSamplingConfig(min_gap=0.25)
    pairs, ties = pair_up(samples(0.0, 0.25, 0.75), config)
    assert texts(pairs) == {("text 2", "text 1"), ("text 2", "text 0")}
    assert ties == 1
    assert pair_up(samples(1.0, 1.0), PairSamplingConfig()) == ([], 1)
    assert pair_up(samples(1.0, 1.0), PairSamplingConfig(pairing="extremes")) == ([], 1)


def test_one_text_is_no_pair_with_itself_and_one_pair_of_texts_is_used_once() -> None:
    twice = [
        ScoredSample("good", True, 0.9),
        ScoredSample(" good ", True, 0.8),
        ScoredSample("bad", True, 0.1),
    ]
    pairs, ties = pair_up([*twice, ScoredSample("bad", False, 0.0)], PairSamplingConfig())
    assert ties == 2
    assert len(pairs) == len(texts(pairs)) == 2
    assert texts(pairs) == {("good", "bad"), (" good ", "bad")}


@given(
    rewards=st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=2, max_size=6),
    gap=st.sampled_from([0.0, 0.25, 0.5]),
    pairing=st.sampled_from(["all", "extremes"]),
)
def test_every_candidate_is_a_pair_or_a_tie(rewards: list[float], gap: float, pairing: str) -> None:
    given_samples = samples(*rewards)
    config = PairSamplingConfig.model_validate({"min_gap": gap, "pairing": pairing})
    pairs, ties = pair_up(given_samples, config)
    count = len(rewards)
    assert len(pairs) + ties == (count * (count - 1) // 2 if pairing == "all" else 1)
    assert all(better.reward - worse.reward > gap for better, worse in pairs)
    if pairing == "extremes" and pairs:
        assert pairs[0][0].reward == max(rewards)
        assert pairs[0][1].reward == min(rewards)


def test_a_pair_needs_two_samples() -> None:
    with pytest.raises(ValidationError):
        PairSamplingConfig(samples_per_prompt=1)


def test_the_largest_number_of_pairs_of_a_prompt_is_never_passed() -> None:
    samples = [ScoredSample(str(i), ended=True, reward=float(i)) for i in range(5)]
    for changes in ({}, {"pairing": "extremes"}, {"pairing": "extremes", "pairs_per_prompt": 4}):
        config = PairSamplingConfig.model_validate({"samples_per_prompt": 5} | changes)
        assert len(pair_up(samples, config)[0]) == config.most_pairs
