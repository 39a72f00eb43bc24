"""Forest plots of win rates and of suite differences: one interval per row, with a line at no difference."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from markupsafe import Markup
from matplotlib.ticker import FuncFormatter, MaxNLocator

from dpo_core.evaluation.compare import Comparison, ComparisonRow
from dpo_core.evaluation.results import Kind
from dpo_core.judging.results import WinRate
from dpo_core.statistics.estimates import Estimate
from tasks.reports.drawing import GREEN, INK, MUTED, RED, WIDE, Figure, reach, slug, svg
from tasks.reports.format import measured, percent
from tasks.reports.run_report import SuiteRow
from tasks.reports.tables import FINDINGS, row_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_BARS = 24  # more are unreadable; the table has all of them
MAX_LABEL = 42  # characters: a longer name would run into the number on its right
_MARK = {"good": (GREEN, "^"), "bad": (RED, "v"), "plain": (MUTED, "o")}


class Bar(NamedTuple):
    """One estimate of a figure."""

    label: str
    text: str
    """The number as text, at the right."""
    value: Estimate
    tone: str
    """good, bad or plain; shown by shape as well as by colour."""
    second: Estimate | None = None
    """A second estimate of the same quantity, drawn hollow below the first."""


def win_rate_figure(rates: Sequence[WinRate]) -> Figure | None:
    """All win rates with intervals against 50%; the length-controlled rate is drawn hollow below."""
    if not rates:
        return None
    bars = [
        Bar(f"{rate.a} vs {rate.b} · {rate.judge}", percent(rate.rate.value), rate.rate,
            "good" if rate.rate.low > 0.5 else "bad" if rate.rate.high < 0.5 else "plain",
            rate.length_controlled)
        for rate in rates[:MAX_BARS]
    ]  # fmt: skip
    note = "Right of the dotted line the first of the two wins more often. Bars: 95% intervals."
    if any(bar.second for bar in bars):
        note += " Hollow: at equal length."
    drawn = _forest("win-rates", "Win rates", bars, 0.5, "share", "win rate")
    return Figure("Win rates", drawn, f"{note} {_cut(len(rates))}".strip())


def difference_figures(comparison: Comparison, suites: Sequence[SuiteRow]) -> list[Figure]:
    """The tested differences of one comparison: all shares in one panel, one panel for each other unit."""
    titles = {row.suite: row.title for row in suites}
    panels: dict[tuple[Kind, str], list[ComparisonRow]] = {}
    tested = [row for row in comparison.rows if row.p_holm is not None]
    for row in tested:
        unit = "" if row.kind == "share" else row.unit or row.label
        panels.setdefault((row.kind, unit), []).append(row)
    versus = f"{comparison.candidate} minus {comparison.baseline}"
    return [
        Figure(
            "Shares" if kind == "share" else unit,
            _forest(
                f"difference-{slug(versus)}-{index}",
                versus,
                [_difference(row, titles) for row in _clearest(rows)],
                0.0,
                kind,
                f"difference{', percentage points' if kind == 'share' else ''}",
            ),
            _cut(len(rows)),
        )
        for index, ((kind, unit), rows) in enumerate(sorted(panels.items(), key=_shares_first))
    ]


def _shares_first(panel: tuple[tuple[Kind, str], list[ComparisonRow]]) -> tuple[bool, str]:
    (kind, unit), _ = panel
    return kind != "share", unit


def _difference(row: ComparisonRow, titles: Mapping[str, str]) -> Bar:
    value = measured(row.difference, row.kind, difference=True).value
    mark = FINDINGS[row.finding]
    name = row_name(row, titles)
    label = name if row.label.lower() in ("accuracy", "") else f"{name} · {row.label}"
    return Bar(label, f"{value} {mark.value[0]}", row.difference, mark.tone)


def _cut(count: int) -> str:
    return f"{MAX_BARS} of {count} are drawn." if count > MAX_BARS else ""


def _clearest(rows: Sequence[ComparisonRow]) -> list[ComparisonRow]:
    """At most MAX_BARS rows, those with the smallest p, in the order of the table."""
    clearest = sorted(range(len(rows)), key=lambda i: rows[i].p)[:MAX_BARS]
    return [rows[i] for i in sorted(clearest)]


def _forest(key: str, title: str, bars: Sequence[Bar], nothing: float, kind: Kind, axis: str) -> Markup:
    def tick(value: float, _: object) -> str:
        text = f"{100 * value:.3g}{'%' if nothing else ''}" if kind == "share" else f"{value:.3g}"
        return text.replace("-", "−")

    def draw(axes: "Axes") -> None:
        beside = axes.get_yaxis_transform()  # x as a share of the width, y in rows
        for y, bar in enumerate(bars):
            colour, marker = _MARK[bar.tone]
            # Interrupt the line of no difference at the labels between the bars.
            axes.vlines(nothing, y - 0.06, y + 0.5, color=MUTED, linewidth=1, linestyle=":")
            _bar(axes, bar.value, y + 0.12, colour, marker, colour)
            if bar.second:
                _bar(axes, bar.second, y + 0.36, colour, marker, "none")
            words: dict[str, Any] = {"transform": beside, "va": "center", "color": INK}
            axes.text(0, y - 0.24, _short(bar.label), ha="left", **words)
            axes.text(1, y - 0.24, bar.text.replace("-", "−"), ha="right", fontweight="bold", **words)
        axes.set_ylim(len(bars) - 0.4, -0.5)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.grid(False)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(FuncFormatter(tick))
        axes.set_xlabel(axis)

    described = "; ".join(f"{bar.label}: {measured(bar.value, kind, difference=not nothing)}" for bar in bars)
    return svg(key, title, described, draw, (WIDE[0], 0.9 + 0.62 * len(bars)))


def _bar(axes: "Axes", value: Estimate, y: float, colour: str, marker: str, fill: str) -> None:
    axes.errorbar(
        value.value, y, xerr=reach(value.value, value.low, value.high), fmt=marker, color=colour,
        markerfacecolor=fill, markersize=7 if fill != "none" else 5, elinewidth=1.6 if fill != "none" else 1,
        capsize=3,
    )  # fmt: skip


def _short(label: str) -> str:
    return label if len(label) <= MAX_LABEL else f"{label[: MAX_LABEL - 1]}…"
