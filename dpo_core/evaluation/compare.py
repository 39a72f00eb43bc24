"""Compares two models on the same suites: paired differences with intervals, tests and Holm's correction.

`dpo compare`, the run page and the promotion decision read the rows.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np

from dpo_core.config import Config
from dpo_core.errors import StageFailed
from dpo_core.evaluation.results import Better, Item, Kind, Measure, SuiteResult, estimate
from dpo_core.statistics.estimates import Estimate, paired_bootstrap, share_difference
from dpo_core.statistics.significance import bootstrap_p, holm, mcnemar

LEVEL = 0.05
"""A row is better or worse if its corrected p-value is at most this."""

Test = Literal["McNemar", "paired bootstrap"]
Finding = Literal["better", "worse", "undecided"]


class ComparisonRow(Config):
    """One measure of a candidate and its baseline, on the items that both answered."""

    suite: str
    measure: str
    label: str
    subset: str = ""
    better: Better
    kind: Kind
    unit: str = ""
    candidate: Estimate
    baseline: Estimate
    difference: Estimate
    """Candidate minus baseline, paired by item. Interval: Newcombe's for shares, else a bootstrap."""
    items: int
    """Number of items that both answered."""
    test: Test
    p: float
    """Two-sided p-value of no difference: McNemar's exact test where every prompt has one item that is right
    or wrong, else the bootstrap. It decides `finding`, not the interval."""
    p_holm: float | None = None
    """Corrected for all rows that are tested together (Holm 1979): those over all items of a suite, with a
    better direction. None for informative rows: a subset, or no direction."""
    finding: Finding
    """Better or worse at 5 % after the correction; `undecided` for informative rows."""


class Comparison(Config):
    """A candidate against one baseline."""

    candidate: str
    baseline: str
    rows: list[ComparisonRow]
    left_out: list[str]
    """Suites, measures and items that could not be compared, each with the reason."""


class _Pair(NamedTuple):
    """A measure of a suite that both models have."""

    suite: str
    measure: Measure
    items: list[tuple[Item, Item]]


def compare(
    candidate: Sequence[SuiteResult], baseline: Sequence[SuiteResult], *, seed: int = 0
) -> Comparison:
    """Pair the items of the suites that both models ran in the same way, and test every measure.

    Args:
        candidate, baseline: the suites of one model each.
        seed: of the resampling.

    Raises:
        StageFailed: one side has no suite, or one suite twice.
    """
    ours, theirs = _by_suite(candidate, "candidate"), _by_suite(baseline, "baseline")
    left_out = [
        f"{name}: only {candidate[0].model if name in ours else baseline[0].model} was evaluated on it"
        for name in [*ours, *theirs]
        if (name in ours) != (name in theirs)
    ]
    rows: list[ComparisonRow] = []
    for name, mine in ours.items():
        if name not in theirs:
            continue
        if reason := _why_incomparable(mine, theirs[name]):
            left_out.append(f"{name}: {reason}")
            continue
        rows += [_row(pair, seed) for pair in _pairs(mine, theirs[name], left_out)]
    return Comparison(
        candidate=candidate[0].model, baseline=baseline[0].model, rows=_corrected(rows), left_out=left_out
    )


def _by_suite(results: Sequence[SuiteResult], side: str) -> dict[str, SuiteResult]:
    if not results:
        raise StageFailed(
            f"the {side} has no results of any suite",
            "Evaluate both models on at least one suite of the same name",
        )
    by_suite = {result.suite: result for result in results}
    if len(by_suite) < len(results):
        twice = Counter(result.suite for result in results).most_common(1)[0][0]
        raise StageFailed(
            f"the {side} ({results[0].model}) has several results of the suite {twice}",
            "Name each suite once",
        )
    return by_suite


def _why_incomparable(mine: SuiteResult, theirs: SuiteResult) -> str:
    """Why two results of a suite are not comparable; empty if they are."""
    if mine.data.get("sha256") != theirs.data.get("sha256"):
        return "the two used different data files"
    names = sorted(mine.settings.keys() | theirs.settings.keys())
    differing = [
        f"{name} ({_setting(mine, name)}, {_setting(theirs, name)})"
        for name in names
        if _setting(mine, name) != _setting(theirs, name)
    ]
    return f"the two used different settings: {', '.join(differing)}" if differing else ""


def _setting(result: SuiteResult, name: str) -> str:
    return str(result.settings[name]) if name in result.settings else "not set"


def _pairs(mine: SuiteResult, theirs: SuiteResult, left_out: list[str]) -> Iterator[_Pair]:
    """The measures with the items that both have; the others are added to `left_out`."""
    other_items = {item.id: item for item in theirs.items}
    for measure in mine.measures:
        title = _title(mine.suite, measure)
        other = theirs.measure(measure.name, measure.subset)
        if measure.subset and (other is None or not measure.paired):
            continue  # reported for the full suite
        if other is None:
            left_out.append(f"{title}: {theirs.model} does not have it")
            continue
        if not (measure.paired and other.paired):
            left_out.append(f"{title}: not a mean over items, so items cannot be paired")
            continue
        own = [item for item in mine.items if _has(item, measure)]
        both = [(item, other_items[item.id]) for item in own if _has(other_items.get(item.id), measure)]
        prompts = len({item.cluster for item, _ in both})
        if prompts < 2:
            if not measure.subset:
                left_out.append(f"{title}: {prompts} prompt(s) in common, and a comparison needs two")
            continue
        unpaired = len(own) + sum(_has(item, measure) for item in theirs.items) - 2 * len(both)
        if unpaired and not measure.subset:
            left_out.append(f"{title}: {unpaired} items are only in one of the two results")
        yield _Pair(mine.suite, measure, both)
    for measure in theirs.measures:
        if not (measure.subset or mine.measure(measure.name)):
            left_out.append(f"{_title(mine.suite, measure)}: {mine.model} does not have it")


def _title(suite: str, measure: Measure) -> str:
    return f"{suite} {measure.name} ({measure.subset})" if measure.subset else f"{suite} {measure.name}"


def _has(item: Item | None, measure: Measure) -> bool:
    return item is not None and measure.name in item.values and measure.subset in ("", item.subset)


def _row(pair: _Pair, seed: int) -> ComparisonRow:
    measure = pair.measure
    mine, theirs = [item for item, _ in pair.items], [item for _, item in pair.items]
    a, b = (np.array([item.values[measure.name] for item in side]) for side in (mine, theirs))
    clusters = [item.cluster for item in mine]
    single_items = len(set(clusters)) == len(clusters)
    right_or_wrong = bool(np.isin(np.concatenate([a, b]), (0.0, 1.0)).all())
    plain = single_items and right_or_wrong
    return ComparisonRow(
        suite=pair.suite,
        measure=measure.name,
        label=measure.label,
        subset=measure.subset,
        better=measure.better,
        kind=measure.kind,
        unit=measure.unit,
        candidate=estimate(mine, measure, seed),
        baseline=estimate(theirs, measure, seed),
        difference=(
            share_difference(a, b, clusters)
            if measure.kind == "share"
            else paired_bootstrap(a, b, clusters, seed=seed)
        ),
        items=len(clusters),
        test="McNemar" if plain else "paired bootstrap",
        p=mcnemar(a, b) if plain else bootstrap_p(a, b, clusters, seed=seed),
        finding="undecided",
    )


def _corrected(rows: Sequence[ComparisonRow]) -> list[ComparisonRow]:
    """The rows with `p_holm` and `finding`."""
    tested = [i for i, row in enumerate(rows) if not row.subset and row.better != "neither"]
    corrected = dict(zip(tested, holm([rows[i].p for i in tested]), strict=True))
    return [
        row.model_copy(update={"p_holm": corrected[i], "finding": _finding(row, corrected[i])})
        if i in corrected
        else row
        for i, row in enumerate(rows)
    ]


def worse_categories(rows: Sequence[ComparisonRow]) -> list[ComparisonRow]:
    """Of rows of subsets, those that are significantly worse after Holm's correction over all of them."""
    tested = [row for row in rows if row.subset and row.better != "neither"]
    corrected = holm([row.p for row in tested])
    named = [row.model_copy(update={"p_holm": p}) for row, p in zip(tested, corrected, strict=True)]
    return [row for row in named if _finding(row, row.p_holm or 0.0) == "worse"]


def _finding(row: ComparisonRow, p: float) -> Finding:
    if p > LEVEL or row.difference.value == 0:
        return "undecided"
    return "better" if (row.difference.value > 0) == (row.better == "higher") else "worse"
