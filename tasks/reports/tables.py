"""The tables of suites, comparisons and win rates, shared by the page, Markdown and the terminal."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from rich.table import Table as RichTable
from rich.text import Text

from dpo_core.evaluation.compare import Comparison, ComparisonRow
from dpo_core.evaluation.results import Measure
from dpo_core.judging.results import WinRate
from tasks.reports.format import Cell, measured, number, p_value, percent, share
from tasks.reports.run_report import SuiteRow

_LOWER = {"higher": "", "lower": "lower is better", "neither": ""}
FINDINGS = {
    "better": Cell("▲ better", tone="good"),
    "worse": Cell("▼ worse", tone="bad"),
    "undecided": Cell("○ undecided", tone="plain"),
}
_INFORMS = Cell("– not tested", tone="plain")
_NOTHING = Cell("–")
_TOO_FEW = Cell("–", more="too few to tell")


class Line(NamedTuple):
    """One line of a table: label, hint and cells."""

    label: str
    hint: str
    cells: list[Cell]


class SuiteTable(NamedTuple):
    """All suites: a line for each measure over all items, and the measures of subsets by suite."""

    head: list[str]
    """The models, then the number of items."""
    lines: list[Line]
    subsets: dict[str, list[Line]]


class ComparisonTable(NamedTuple):
    """A candidate against a baseline: the rows that were tested together, and the untested ones."""

    candidate: str
    baseline: str
    outcome: str
    tested: list[Line]
    informing: list[Line]
    left_out: list[str]


COMPARISON_HEAD = ["Difference", "Finding", "Candidate", "Baseline", "p", "p (Holm)"]
WIN_RATE_HEAD = [
    "Win rate", "At equal length", "Win / tie / loss", "Consistency", "Mean length", "Judge's cost",
]  # fmt: skip


# --------------------------------------------------------------------------------------------------- suites


def suite_table(suites: Sequence[SuiteRow]) -> SuiteTable:
    """One line per measure, one cell per model; a dash if the model was not measured."""
    policies = list(dict.fromkeys(row.policy for row in suites))
    lines: list[Line] = []
    subsets: dict[str, list[Line]] = {}
    for suite in dict.fromkeys(row.suite for row in suites):
        rows = [row for row in suites if row.suite == suite]
        title = rows[0].title
        measures = {(row.policy, m.subset, m.name): m for row in rows for m in row.measures}
        for (subset, name), measure in {key[1:]: m for key, m in measures.items()}.items():
            cells = [_suite_cell(measures.get((policy, subset, name))) for policy in policies]
            hint = ", ".join(part for part in (measure.label, measure.unit, _LOWER[measure.better]) if part)
            if subset:
                subsets.setdefault(title, []).append(Line(subset, hint, cells))
            else:
                counts = {m.estimate.n for p in policies if (m := measures.get((p, subset, name)))}
                lines.append(Line(title, hint, [*cells, _prompts(counts, rows)]))
    return SuiteTable([*policies, "Prompts"], lines, subsets)


def _suite_cell(measure: Measure | None) -> Cell:
    if measure is None:
        return _NOTHING
    clean = f"{measured(measure.clean, measure.kind).value} clean" if measure.clean else ""
    return measured(measure.estimate, measure.kind, more=clean)


def _prompts(prompts: set[int], rows: Sequence[SuiteRow]) -> Cell:
    """The number of prompts of a measure, and of items of the suite that are in the training data."""
    dirty = _span({row.contaminated for row in rows})
    return Cell(_span(prompts), more="" if dirty == "0" else f"{dirty} items in training")


def _span(counts: set[int]) -> str:
    """1,319, or 1,200 to 1,319 if models differ."""
    return " to ".join(f"{count:,}" for count in sorted({min(counts), max(counts)}))


# ---------------------------------------------------------------------------------------------- comparisons


def comparison_table(comparison: Comparison, suites: Sequence[SuiteRow]) -> ComparisonTable:
    """The table of one comparison."""
    titles = {row.suite: row.title for row in suites}
    lines = [(row, _comparison_line(row, titles)) for row in comparison.rows]
    return ComparisonTable(
        comparison.candidate,
        comparison.baseline,
        outcome(comparison),
        [line for row, line in lines if row.p_holm is not None],
        [line for row, line in lines if row.p_holm is None],
        list(comparison.left_out),
    )


def outcome(comparison: Comparison) -> str:
    """The counts of a comparison: "2 better, 1 worse, 5 undecided"."""
    tested = [row.finding for row in comparison.rows if row.p_holm is not None]
    if not tested:
        return "nothing was tested"
    return ", ".join(f"{tested.count(name)} {name}" for name in ("better", "worse", "undecided"))


def row_name(row: ComparisonRow, titles: Mapping[str, str]) -> str:
    """Suite and subset of a row."""
    return " · ".join(part for part in (titles.get(row.suite, row.suite), row.subset) if part)


def _comparison_line(row: ComparisonRow, titles: Mapping[str, str]) -> Line:
    return Line(
        row_name(row, titles),
        ", ".join(part for part in (row.label, _LOWER[row.better]) if part),
        [
            measured(row.difference, row.kind, difference=True),
            _INFORMS if row.p_holm is None else FINDINGS[row.finding],
            measured(row.candidate, row.kind),
            measured(row.baseline, row.kind),
            Cell(p_value(row.p), more=row.test),
            _NOTHING if row.p_holm is None else Cell(p_value(row.p_holm)),
        ],
    )


# ------------------------------------------------------------------------------------------------ win rates


def win_rate_lines(rates: Iterable[WinRate]) -> list[Line]:
    """One line per win rate, with the cells of `WIN_RATE_HEAD`."""
    return [
        Line(
            f"{rate.a} vs {rate.b}",
            f"judge: {rate.judge}",
            [
                share(rate.rate),
                share(rate.length_controlled) if rate.length_controlled else _TOO_FEW,
                Cell(
                    f"{rate.wins:,} / {rate.ties:,} / {rate.losses:,}",
                    more=f"{rate.unjudged:,} unjudged" if rate.unjudged else "",
                ),
                _NOTHING if rate.position_consistency is None else Cell(percent(rate.position_consistency)),
                Cell(f"{number(rate.length_a)} / {number(rate.length_b)}"),
                Cell("–" if rate.cost is None else f"{rate.cost:,.2f}", more=_requests(rate)),
            ],
        )
        for rate in rates
    ]


def _requests(rate: WinRate) -> str:
    counts = [(rate.requests, "requests"), (rate.cached, "cached")]
    return ", ".join(f"{count:,} {word}" for count, word in counts if count)


# ------------------------------------------------------------------------------------------ terminal, plain


def flat(line: Line) -> list[str]:
    """A line for Markdown: its label with the hint, then each cell with its interval and remark."""
    label = f"{line.label} ({line.hint})" if line.hint else line.label
    return [label, *(f"{cell}, {cell.more}" if cell.more else str(cell) for cell in line.cells)]


def rich_table(title: str, head: Sequence[str], lines: Iterable[Line]) -> RichTable:
    """A table for the terminal, whose cells are not parsed as markup."""
    table = RichTable(title=Text(title), title_justify="left")
    table.add_column("")
    for name in head:
        table.add_column(Text(name), justify="right")
    for line in lines:
        cells = (Text("\n".join(part for part in (c.value, c.interval, c.more) if part)) for c in line.cells)
        table.add_row(Text(f"{line.label}\n{line.hint}".strip()), *cells, end_section=True)
    return table
