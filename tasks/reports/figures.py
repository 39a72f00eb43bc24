"""Draws the run page's figures (training curves, reward against KL), each with a description in words."""

from collections.abc import Callable, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, NamedTuple

from matplotlib.ticker import MaxNLocator

from dpo_core.methods.method import Panel
from tasks.recipe.policies import CHAMPION, REFERENCE
from tasks.reports.curves import series, start_and_end
from tasks.reports.drawing import BLUE, INK, MUTED, ORANGE, TEAL, WIDE, Figure, Look, looks, reach, svg
from tasks.reports.format import number
from tasks.reports.run_report import Evaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_POINTS = 200  # longer curves are averaged over neighbours; more points are not distinguishable

_REFERENCE, _CHAMPION = Look(MUTED, "s"), Look(TEAL, "P")


def curve_figures(
    key: str, name: str, panels: Sequence[Panel], rows: Sequence[dict[str, float]]
) -> list[Figure]:
    """One figure for each panel whose metrics were logged. `eval_` metrics are drawn in the same panel.

    Args:
        key: prefix of the figures' ids, unique for each training on a page.
        name: the trained policy or stage.
    """
    figures = []
    for index, panel in enumerate(panels):
        lines = _lines(panel, rows)
        if lines:
            figures.append(_curve(f"{key}-{index}", name, panel, lines))
    return figures


class _Line(NamedTuple):
    label: str
    steps: list[float]
    values: list[float]
    colour: str
    held_out: bool


def _lines(panel: Panel, rows: Sequence[dict[str, float]]) -> list[_Line]:
    lines = []
    for (metric, label), colour in zip(panel.metrics, (BLUE, ORANGE), strict=False):
        for prefix, suffix in (("", ""), ("eval_", ", held out")):
            steps, values = series(rows, prefix + metric)
            if values:
                lines.append(_Line(label + suffix, *_thin(steps, values), colour, bool(prefix)))
    return lines


def _thin(steps: list[float], values: list[float]) -> tuple[list[float], list[float]]:
    """Average neighbours so that at most MAX_POINTS remain; the last group may be smaller."""
    size = -(-len(values) // MAX_POINTS)
    if size <= 1:
        return steps, values
    groups = [slice(i, i + size) for i in range(0, len(values), size)]
    means = [(sum(steps[g]) / len(steps[g]), sum(values[g]) / len(values[g])) for g in groups]
    return [x for x, _ in means], [y for _, y in means]


def _curve(key: str, stage: str, panel: Panel, lines: list[_Line]) -> Figure:
    def draw(axes: "Axes") -> None:
        if panel.baseline is not None:
            axes.axhline(panel.baseline, color=MUTED, linewidth=1, linestyle=":")
        covered = {line.colour for line in lines if line.held_out}  # drawn pale, so that held-out points show
        for index, line in enumerate(lines):
            # Lines differ in shape as well as in colour: dashes for the second, dots for held out.
            style = "--" if line.colour != BLUE else "-"
            marker = "o" if line.held_out or len(line.values) == 1 else None
            axes.plot(
                line.steps, line.values, style, color=line.colour, marker=marker, markersize=4,
                alpha=0.4 if line.colour in covered and not line.held_out else 1,
                label=line.label, zorder=2 + index,
            )  # fmt: skip
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.set_xlabel("step")
        axes.set_ylabel(panel.unit)
        axes.margins(y=0.12)
        if len(lines) > 1:
            axes.legend(
                loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0, handlelength=2.2,
                columnspacing=1.2,
            )  # fmt: skip

    ends = [(line.label, start_and_end(line.values) or (line.values[0], line.values[-1])) for line in lines]
    note = "; ".join(
        f"{label + ': ' if len(lines) > 1 else ''}{number(a)} → {number(b)}" for label, (a, b) in ends
    )
    words = "; ".join(
        f"{line.label} from {number(a)} to {number(b)}, between {number(min(line.values))} and "
        f"{number(max(line.values))}, steps {line.steps[0]:g} to {line.steps[-1]:g}"
        for line, (_, (a, b)) in zip(lines, ends, strict=True)
    )
    return Figure(panel.title, svg(key, f"{panel.title}, {stage}", words, draw), note)


def frontier_figure(evaluation: Evaluation, label: Callable[[str], str] = str) -> Figure | None:
    """The figure of reward gain over SFT against KL, with 95 % intervals; SFT is the origin.

    The paired gain is drawn instead of the reward, because its interval shows whether a policy differs from
    SFT. None if no policy has both numbers. `label` gives the displayed name of a policy.
    """
    points = [row for row in evaluation.policies if row.gain is not None and row.kl is not None]
    points = sorted(
        (row for row in points if row.name != REFERENCE), key=lambda row: row.kl.value if row.kl else 0
    )
    if not points:
        return None
    trained = [row.name for row in evaluation.policies if row.name not in (REFERENCE, CHAMPION)]
    styles = looks(trained) | {CHAMPION: _CHAMPION}

    def draw(axes: "Axes") -> None:
        axes.axhline(0, color=MUTED, linewidth=1, linestyle=":")
        axes.plot([0], [0], _REFERENCE.marker, color=_REFERENCE.colour, markersize=7)
        axes.annotate(REFERENCE, (0, 0), (7, -14), textcoords="offset points", color=INK, fontweight="bold")
        # From left to right, labels on alternating sides, so that coinciding policies stay readable.
        sides = [((-7, 6), "right"), ((7, 6), "left"), ((-7, -14), "right"), ((7, -14), "left")]
        for row, (offset, side) in zip(points, cycle(sides), strict=False):
            assert row.gain is not None
            assert row.kl is not None
            colour, marker = styles[row.name]
            axes.errorbar(
                row.kl.value, row.gain.value, fmt=marker, color=colour, markersize=7, elinewidth=1.4,
                capsize=3,
                xerr=reach(row.kl.value, row.kl.low, row.kl.high),
                yerr=reach(row.gain.value, row.gain.low, row.gain.high),
            )  # fmt: skip
            axes.annotate(
                label(row.name), (row.kl.value, row.gain.value), offset, textcoords="offset points", ha=side,
                color=INK, fontweight="bold",
            )  # fmt: skip
        axes.set_xlabel("KL to the reference, nats per sequence (k1)")
        axes.set_ylabel(f"reward gain over {REFERENCE}")
        axes.margins(0.12)
        left, right = axes.get_xlim()
        right = max(1.0, right)  # differences far below one nat are noise
        axes.set_xlim(min(left, -0.16 * right), right)  # room for a label left of the origin

    words = "; ".join(
        f"{label(row.name)} gains {number(row.gain.value, signed=True)} "
        f"({number(row.gain.low)} to {number(row.gain.high)}) "
        f"at KL {number(row.kl.value)} ({number(row.kl.low)} to {number(row.kl.high)})"
        for row in points
        if row.gain and row.kl
    )
    drawn = svg("frontier", f"Reward gain over {REFERENCE} against KL to the reference", words, draw, WIDE)
    return Figure(
        "Reward against KL", drawn, "Up is better, left is closer to the reference. Bars: 95% intervals."
    )
