"""Comparison of two models on suites: pairing, tests, correction, findings and exclusions."""

import numpy as np
import pytest

from dpo_core.errors import StageFailed
from dpo_core.evaluation.compare import Comparison, compare
from dpo_core.evaluation.results import Item, Measure
from dpo_core.statistics.estimates import paired_bootstrap, share_difference, wilson
from dpo_core.statistics.significance import bootstrap_p, holm, mcnemar
from tests.support.reports.made import HARM, LENGTH, RIGHT, SCORE, items_of, result_of


def answers(both: int, ours: int, theirs: int, neither: int) -> tuple[list[int], list[int]]:
    return (
        [1] * both + [1] * ours + [0] * theirs + [0] * neither,
        [1] * both + [0] * ours + [1] * theirs + [0] * neither,
    )


def test_right_or_wrong_answers_are_compared_by_mcnemar() -> None:
    a, b = answers(40, 18, 4, 38)
    comparison = compare([result_of("new", items_of(a))], [result_of("old", items_of(b))])
    (row,) = comparison.rows
    assert (comparison.candidate, comparison.baseline, comparison.left_out) == ("new", "old", [])
    assert (row.suite, row.measure, row.label, row.test, row.items) == (
        "quiz", "right", "answers right", "McNemar", 100,
    )  # fmt: skip
    assert row.p == row.p_holm == mcnemar(a, b)
    assert (row.candidate, row.baseline) == (wilson(58, 100), wilson(44, 100))
    assert row.difference == share_difference(a, b)
    assert row.finding == "better"


def test_items_are_paired_by_their_id_whatever_their_order() -> None:
    a, b = answers(30, 15, 2, 13)
    shuffled = [items_of(b)[i] for i in np.random.default_rng(0).permutation(60)]
    plain = compare([result_of("new", items_of(a))], [result_of("old", items_of(b))])
    assert compare([result_of("new", items_of(a))], [result_of("old", shuffled)]).rows == plain.rows


def test_several_answers_to_a_prompt_are_compared_by_resampling_prompts() -> None:
    rng = np.random.default_rng(1)
    a, b = (rng.random((2, 200)) < [[0.7], [0.6]]).astype(float)
    prompts = np.repeat(np.arange(50), 4).tolist()
    comparison = compare(
        [result_of("new", items_of(a, samples=4))], [result_of("old", items_of(b, samples=4))], seed=5
    )
    (row,) = comparison.rows
    assert (row.test, row.items, row.difference.n) == ("paired bootstrap", 200, 50)
    assert row.p == bootstrap_p(a, b, prompts, seed=5)
    assert row.difference == share_difference(a, b, prompts)


def test_means_are_compared_by_the_paired_bootstrap() -> None:
    rng = np.random.default_rng(2)
    hard = rng.normal(0, 5, 60)
    a, b = hard + 0.5 + rng.normal(0, 0.3, 60), hard
    (row,) = compare(
        [result_of("new", items_of(a, "score"), [SCORE])], [result_of("old", items_of(b, "score"), [SCORE])]
    ).rows
    assert row.difference == paired_bootstrap(a, b)
    assert row.candidate.low < row.baseline.high, "the two intervals overlap"
    assert (row.test, row.finding) == ("paired bootstrap", "better")


def test_lower_may_be_better() -> None:
    a, b = answers(10, 30, 5, 15)
    more = compare(
        [result_of("new", items_of(a, "harm"), [HARM])], [result_of("old", items_of(b, "harm"), [HARM])]
    )
    less = compare(
        [result_of("new", items_of(b, "harm"), [HARM])], [result_of("old", items_of(a, "harm"), [HARM])]
    )
    assert [row.finding for row in (*more.rows, *less.rows)] == ["worse", "better"]


def many(shifts: list[int]) -> Comparison:
    """Suites of 80 items in which the candidate alone is right on 10 + shift, the baseline alone on 10."""
    pairs = [answers(30, 10 + shift, 10, 30 - shift) for shift in shifts]
    return compare(
        [result_of("new", items_of(a), suite=f"s{i}") for i, (a, _) in enumerate(pairs)],
        [result_of("old", items_of(b), suite=f"s{i}") for i, (_, b) in enumerate(pairs)],
    )


def test_rows_are_corrected_for_each_other() -> None:
    comparison = many([14, 15, 20, 0, -8])
    assert [row.p_holm for row in comparison.rows] == holm([row.p for row in comparison.rows])
    assert comparison.rows[0].p < 0.05 < comparison.rows[0].p_holm, "alone it would have been found"
    assert [row.finding for row in comparison.rows] == [
        "undecided",
        "undecided",
        "better",
        "undecided",
        "undecided",
    ]


def test_equal_models_are_rarely_told_apart_over_many_measures() -> None:
    """The family-wise error: of 100 comparisons of 8 measures without a difference at most 5 % find one."""
    rng = np.random.default_rng(3)
    wrong = uncorrected = 0
    for _ in range(100):
        sides = [
            [result_of(model, items_of(rng.random(40) < 0.6), suite=f"s{i}") for i in range(8)]
            for model in ("new", "old")
        ]
        rows = compare(*sides).rows
        wrong += any(row.finding != "undecided" for row in rows)
        uncorrected += any(row.p <= 0.05 for row in rows)
    assert wrong <= 0.05 * 100 + 2 * np.sqrt(100 * 0.05 * 0.95)
    assert uncorrected > 2 * wrong


def test_subsets_and_measures_without_a_direction_only_inform() -> None:
    a, b = answers(4, 60, 0, 16)
    ours = items_of(a, subsets=["safe", "unsafe"])
    theirs = items_of(b, subsets=["safe", "unsafe"])
    long = [
        item.model_copy(update={"values": {**item.values, "length": 9.0 + i}}) for i, item in enumerate(ours)
    ]
    short = [item.model_copy(update={"values": {**item.values, "length": 1.0}}) for item in theirs]
    rows = compare([result_of("new", long, [RIGHT, LENGTH])], [result_of("old", short, [RIGHT, LENGTH])]).rows
    outcomes = {(row.measure, row.subset): (row.p_holm is None, row.finding, row.items) for row in rows}
    assert outcomes == {
        ("right", ""): (False, "better", 80),
        ("length", ""): (True, "undecided", 80),
        ("right", "safe"): (True, "undecided", 40),
        ("length", "safe"): (True, "undecided", 40),
        ("right", "unsafe"): (True, "undecided", 40),
        ("length", "unsafe"): (True, "undecided", 40),
    }
    assert all(row.p < 0.001 for row in rows)


def left_out(ours: list, theirs: list) -> list[str]:
    comparison = compare(ours, theirs)
    assert len(comparison.rows) <= 1
    return comparison.left_out


def test_what_was_not_asked_alike_is_left_out_with_the_reason() -> None:
    items = items_of([1, 0, 1, 1])
    new, old = result_of("new", items), result_of("old", items)
    assert left_out([new], [result_of("old", items, suite="exam")]) == [
        "quiz: only new was evaluated on it",
        "exam: only old was evaluated on it",
    ]
    assert left_out([new], [result_of("old", items, sha256="d2")]) == [
        "quiz: the two used different data files"
    ]
    assert left_out([result_of("new", items, shots=5, seed=1)], [result_of("old", items, seed=1)]) == [
        "quiz: the two used different settings: shots (5, not set)"
    ]
    assert left_out([result_of("new", items, version=2)], [old]) == [
        "quiz: the two used different settings: version (2, 1)"
    ]


def test_measures_that_cannot_be_paired_are_left_out_with_the_reason() -> None:
    items = items_of([1, 0, 1, 1])
    ece = Measure(name="ece", label="calibration error", estimate=wilson(1, 4), paired=False)
    new, old = result_of("new", items, others=[ece]), result_of("old", items)
    unpaired = "quiz ece: not a mean over items, so items cannot be paired"
    assert left_out([new], [result_of("old", items, others=[ece])]) == [unpaired]
    assert left_out([new], [old]) == ["quiz ece: old does not have it"]
    assert left_out([old], [new]) == ["quiz ece: old does not have it"]
    other = [Item(id=f"x{i}", cluster=f"x{i}", values={"right": 1.0}) for i in range(3)]
    assert left_out([old], [result_of("new", [*items[:1], *other])]) == [
        "quiz right: 1 prompt(s) in common, and a comparison needs two"
    ]


def test_items_that_only_one_has_are_counted() -> None:
    items = items_of([1, 0, 1, 1, 0, 1, 1], subsets=["x", "y"])
    found = compare([result_of("new", items[:6])], [result_of("old", items[1:])])
    assert [row.items for row in found.rows] == [5, 2, 3]
    assert found.rows[0].candidate.n == found.rows[0].baseline.n == 5
    assert found.left_out == ["quiz right: 2 items are only in one of the two results"]


def test_nothing_or_the_same_suite_twice_is_refused() -> None:
    result = result_of("new", items_of([1, 0]))
    with pytest.raises(StageFailed, match="the baseline has no results of any suite"):
        compare([result], [])
    with pytest.raises(StageFailed, match=r"the candidate \(new\) has several results of the suite quiz"):
        compare([result, result], [result])
    assert compare([result], [result]).rows[0].p == 1.0
