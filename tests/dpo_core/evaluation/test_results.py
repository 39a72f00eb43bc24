"""Measures computed from items: by hand, by subset, without contaminated items."""

import pytest

from dpo_core.errors import StageFailed
from dpo_core.evaluation.results import Item, compute_measures, estimate
from dpo_core.statistics.estimates import bootstrap_mean, share, wilson
from tests.support.reports.made import LENGTH, RIGHT, SCORE, items_of, result_of


def test_a_share_of_one_answer_a_prompt_is_wilsons() -> None:
    items = items_of([1] * 61 + [0] * 39)
    assert estimate(items, RIGHT) == wilson(61, 100)
    (measure,) = compute_measures(items, [RIGHT])
    assert (measure.name, measure.label, measure.better, measure.kind) == (
        "right",
        "answers right",
        "higher",
        "share",
    )
    assert measure.estimate == wilson(61, 100)
    assert measure.clean is None
    assert measure.paired


def test_several_answers_are_resampled_by_their_prompt() -> None:
    values = [1, 1, 0, 0, 1, 0, 1, 1]
    measures = estimate(items_of(values, samples=2), RIGHT)
    assert measures == share(values, [0, 0, 1, 1, 2, 2, 3, 3])
    assert (measures.value, measures.n) == (0.625, 4)
    lengths = [3.0, 5.0, 40.0, 2.0]
    mean = estimate(items_of(lengths, "length", samples=2), LENGTH, seed=7)
    assert mean == bootstrap_mean(lengths, ["a", "a", "b", "b"], seed=7)


def test_measures_by_subset_follow_those_over_all() -> None:
    items = items_of([1, 0, 1, 1, 1, 0], subsets=["safe", "unsafe"])
    measures = compute_measures(items, [RIGHT])
    assert [(m.subset, m.estimate.value, m.estimate.n) for m in measures] == [
        ("", pytest.approx(4 / 6), 6),
        ("safe", 1.0, 3),
        ("unsafe", pytest.approx(1 / 3), 3),
    ]
    assert [m.subset for m in compute_measures(items_of([1, 0], subsets=["one"]), [RIGHT])] == [""], (
        "one is all"
    )


def test_an_item_counts_only_for_the_measures_that_it_has() -> None:
    refused = [Item(id="a", cluster="a", subset="x", values={"right": 1}) for _ in range(1)]
    others = [Item(id=n, cluster=n, subset="y", values={"score": 2.0}) for n in ("b", "c")]
    measures = {
        (m.name, m.subset): m.estimate.n
        for m in compute_measures([*refused, *others], [RIGHT, SCORE, LENGTH])
    }
    assert measures == {("right", ""): 1, ("score", ""): 2, ("right", "x"): 1, ("score", "y"): 2}


def test_measures_are_given_again_without_contaminated_items() -> None:
    items = items_of([1, 1, 0, 0, 1, 0], subsets=["even", "odd"])
    all_, even, odd = compute_measures(items, [RIGHT], without=["i0", "i2", "unknown"])
    assert all_.clean == wilson(2, 4)
    assert all_.estimate == wilson(3, 6)
    assert even.clean == wilson(1, 1)
    assert odd.clean is None, "nothing was found there, and it is the same number"
    (everything,) = compute_measures(items_of([1, 0]), [RIGHT], without=["i0", "i1"])
    assert everything.clean is None, "nothing is left"


def test_clean_means_are_resampled_without_the_items() -> None:
    items = items_of([1.0, 2.0, 3.0, 10.0], "score")
    (measure,) = compute_measures(items, [SCORE], without=["i3"], seed=3)
    assert measure.clean == bootstrap_mean([1.0, 2.0, 3.0], seed=3)


def test_what_is_no_share_is_refused_by_name() -> None:
    with pytest.raises(StageFailed, match=r"right of item i1 is 1\.5"):
        estimate(items_of([1, 1.5]), RIGHT)
    with pytest.raises(StageFailed, match="at least 2 prompts, not 1"):
        estimate(items_of([3.0, 4.0], "score", samples=2), SCORE)


def test_a_measure_is_found_by_name_and_subset() -> None:
    result = result_of("m", items_of([1, 0, 1, 1], subsets=["a", "b"]))
    assert result.measure("right") == result.measures[0]
    measure = result.measure("right", "b")
    assert measure is not None
    assert measure.estimate.value == 0.5
    assert result.measure("right", "c") is result.measure("wrong") is None
