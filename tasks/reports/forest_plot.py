"""Forest plots of win rates and of suite differences: one interval per row, with a line at no difference."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from matplotlib.ticker import FuncFormatter, MaxNLocator

from dpo_core.evaluation.compare import Comparison, ComparisonRow
from dpo_core.evaluation.results import Kind
from dpo_core.judging.results import WinRate
from dpo_core.statistics.estimates import Estimate
from dpo_core.statistics.format import Kind as Form
from dpo_core.statistics.format import interval, percent
from tasks.reports.document import Figure
from tasks.reports.drawing import GREEN, INK, MUTED, RED, WIDE, reach

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_BARS = 24  # more are unreadable; the table has all of them
MAX_LABEL = 42  # characters: a longer name would run into the number on its right
_MARK = {
    "good": (GREEN, "^"), "bad": (RED, "v"), "plain": (MUTED, "o"),
    "better": (GREEN, "^"), "worse": (RED, "v"), "undecided": (MUTED, "o"),
}  # fmt: skip
_SYMBOL = {"better": "▲", "worse": "▼", "undecided": "○"}


class Bar(NamedTuple):
    """One estimate of a figure."""

    label: str
    text: str
    """The number as text, at the right."""
    value: Estimate
    mark: str
    """A key of `_MARK`: shown by shape as well as by colour."""
    second: Estimate | None = None
    """A second estimate of the same quantity, drawn hollow below the first."""


def win_rate_figure(rates: Sequence[WinRate], label: Callable[[str], str]) -> Figure:
    """All win rates with intervals against 50%; the length-controlled rate is drawn hollow below."""
    bars = [
        Bar(
            f"{label(rate.a)} vs {label(rate.b)} · {rate.judge}",
            percent(rate.rate.value),
            rate.rate,
            "good" if rate.rate.low > 0.5 else "bad" if rate.rate.high < 0.5 else "plain",
            rate.length_controlled,
        )
        for rate in rates[:MAX_BARS]
    ]
    note = "Right of the dotted line the first of the two wins more often. Bars: 95% intervals."
    if any(bar.second for bar in bars):
        note += " Hollow: at equal length."
    return _forest("win-rates", "", f"{note} {_cut(len(rates))}".strip(), bars, "share", False)


def difference_figures(
    key: str, comparison: Comparison, titles: Mapping[str, str], label: Callable[[str], str]
) -> list[Figure]:
    """The tested differences of one comparison: all shares in one panel, one panel for each other unit.

    Args:
        key: prefix of the figures' ids.
        titles: titles of suites by name.
    """
    panels: dict[tuple[bool, str], list[ComparisonRow]] = {}
    for row in comparison.rows:
        if row.p_holm is not None:
            unit = "" if row.kind == "share" else row.unit or row.label
            panels.setdefault((row.kind != "share", unit), []).append(row)
    return [
        _forest(
            f"{key}-{index}",
            f"{unit or 'Shares'}: {label(comparison.candidate)} minus {label(comparison.baseline)}",
            _cut(len(rows)),
            [_difference(row, titles) for row in _clearest(rows)],
            rows[0].kind,
            True,
        )
        for index, ((_, unit), rows) in enumerate(sorted(panels.items()))
    ]


def row_name(row: ComparisonRow, titles: Mapping[str, str]) -> str:
    """Suite and subset of a row."""
    return " · ".join(part for part in (titles.get(row.suite, row.suite), row.subset) if part)


def _difference(row: ComparisonRow, titles: Mapping[str, str]) -> Bar:
    value = interval(row.difference, "points" if row.kind == "share" else "gap").value
    name = row_name(row, titles)
    label = name if row.label.lower() in ("accuracy", "") else f"{name} · {row.label}"
    return Bar(label, f"{value} {_SYMBOL[row.finding]}", row.difference, row.finding)


def _cut(count: int) -> str:
    return f"{MAX_BARS} of {count} are drawn." if count > MAX_BARS else ""


def _clearest(rows: Sequence[ComparisonRow]) -> list[ComparisonRow]:
    """At most MAX_BARS rows, those with the smallest p, in the order of the table."""
    clearest = sorted(range(len(rows)), key=lambda i: rows[i].p)[:MAX_BARS]
    return [rows[i] for i in sorted(clearest)]


def _forest(key: str, title: str, note: str, bars: Sequence[Bar], kind: Kind, difference: bool) -> Figure:
    nothing = 0.0 if difference else 0.5
    form: Form = "gap" if kind != "share" else "points" if difference else "share"

    def tick(value: float, _: object) -> str:
        text = f"{100 * value:.3g}{'' if difference else '%'}" if kind == "share" else f"{value:.3g}"
        return text.replace("-", "−")

    def draw(axes: "Axes") -> None:
        beside = axes.get_yaxis_transform()  # x as a share of the width, y in rows
        for y, bar in enumerate(bars):
            colour, marker = _MARK[bar.mark]
            # Interrupt the line of no difference at the labels between the bars.
            axes.vlines(nothing, y - 0.06, y + 0.5, color=MUTED, linewidth=1, linestyle=":")
            _bar(axes, bar.value, y + 0.12, colour, marker, colour)
            if bar.second:
                _bar(axes, bar.second, y + 0.36, colour, marker, "none")
            words: dict[str, Any] = {"transform": beside, "va": "center", "color": INK, "parse_math": False}
            axes.text(0, y - 0.24, _short(bar.label), ha="left", **words)
            axes.text(1, y - 0.24, bar.text.replace("-", "−"), ha="right", fontweight="bold", **words)
        axes.set_ylim(len(bars) - 0.4, -0.5)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.grid(False)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(FuncFormatter(tick))
        unit = ", percentage points" if kind == "share" else ""
        axes.set_xlabel(f"difference{unit}" if difference else "win rate")

    words = "; ".join(f"{bar.label}: {interval(bar.value, form)}" for bar in bars)
    size = (WIDE[0], 0.9 + 0.62 * len(bars))
    return Figure(key, title, note, f"{title or 'Win rates'}: {words}", draw, size)


def _bar(axes: "Axes", value: Estimate, y: float, colour: str, marker: str, fill: str) -> None:
    hollow = fill == "none"
    axes.errorbar(
        value.value, y, xerr=reach(value), fmt=marker, color=colour, markerfacecolor=fill,
        markersize=5 if hollow else 7, elinewidth=1 if hollow else 1.6, capsize=3,
    )  # fmt: skip


def _short(label: str) -> str:
    return label if len(label) <= MAX_LABEL else f"{label[: MAX_LABEL - 1]}…"
