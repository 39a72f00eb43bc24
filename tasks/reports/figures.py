"""The run page's figures: training curves, and reward against KL, each with a description in words."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from matplotlib.ticker import MaxNLocator

from dpo_core.methods.method import Panel
from dpo_core.statistics.format import interval, number
from tasks.recipe.policies import CHAMPION, REFERENCE
from tasks.reports.curves import series, start_and_end
from tasks.reports.document import Figure
from tasks.reports.drawing import BLUE, MUTED, ORANGE, TEAL, WIDE, Look, legend, looks, reach
from tasks.reports.run_report import Evaluation

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

MAX_POINTS = 200  # longer curves are averaged over neighbours; more points are not distinguishable


class Curve(NamedTuple):
    """One logged metric of a panel."""

    label: str
    steps: list[float]
    values: list[float]
    colour: str
    held_out: bool

    @property
    def ends(self) -> tuple[float, float]:
        """Means of the first and the last tenth."""
        return start_and_end(self.values) or (self.values[0], self.values[-1])


def curves_of(panel: Panel, rows: Sequence[dict[str, float]]) -> list[Curve]:
    """The panel's metrics that were logged; `eval_` metrics are drawn in the same panel."""
    lines = []
    for (metric, label), colour in zip(panel.metrics, (BLUE, ORANGE), strict=False):
        for prefix, suffix in (("", ""), ("eval_", ", held out")):
            steps, values = series(rows, prefix + metric)
            if values:
                lines.append(Curve(label + suffix, *_thin(steps, values), colour, bool(prefix)))
    return lines


def _thin(steps: list[float], values: list[float]) -> tuple[list[float], list[float]]:
    """Average neighbours so that at most MAX_POINTS remain; the last group may be smaller."""
    size = -(-len(values) // MAX_POINTS)
    if size <= 1:
        return steps, values
    groups = [slice(i, i + size) for i in range(0, len(values), size)]
    means = [(sum(steps[g]) / len(steps[g]), sum(values[g]) / len(values[g])) for g in groups]
    return [x for x, _ in means], [y for _, y in means]


def curve_figures(
    key: str, name: str, panels: Sequence[Panel], rows: Sequence[dict[str, float]]
) -> list[Figure]:
    """One figure for each panel whose metrics were logged.

    Args:
        key: prefix of the figures' ids, unique for each training on a page.
        name: the trained policy or stage.
    """
    logged = [(panel, curves_of(panel, rows)) for panel in panels]
    return [
        _curve(f"{key}-{index}", name, panel, lines) for index, (panel, lines) in enumerate(logged) if lines
    ]


def ends_in_words(lines: Sequence[Curve]) -> str:
    """`0.693 → 0.455`, with the labels if there are several curves."""
    return "; ".join(
        f"{line.label + ': ' if len(lines) > 1 else ''}{number(line.ends[0])} → {number(line.ends[1])}"
        for line in lines
    )


def _curve(key: str, name: str, panel: Panel, lines: list[Curve]) -> Figure:
    def draw(axes: "Axes") -> None:
        if panel.baseline is not None:
            axes.axhline(panel.baseline, color=MUTED, linewidth=1, linestyle=":")
        covered = {line.colour for line in lines if line.held_out}  # drawn pale, so that held-out points show
        for index, line in enumerate(lines):
            # Lines differ in shape as well as in colour: dashes for the second, dots for held out.
            axes.plot(
                line.steps, line.values, "--" if line.colour != BLUE else "-", color=line.colour,
                marker="o" if line.held_out or len(line.values) == 1 else None, markersize=4,
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

    words = "; ".join(
        f"{line.label} from {number(line.ends[0])} to {number(line.ends[1])}, between "
        f"{number(min(line.values))} and {number(max(line.values))}, steps {line.steps[0]:g} to "
        f"{line.steps[-1]:g}"
        for line in lines
    )
    return Figure(key, panel.title, ends_in_words(lines), f"{panel.title}, {name}: {words}", draw)


def frontier_figure(evaluation: Evaluation, label: Callable[[str], str]) -> Figure | None:
    """The figure of reward gain over SFT against KL, with 95 % intervals; SFT is the origin.

    The paired gain is drawn instead of the reward, because its interval shows whether a policy differs from
    SFT. None if no policy has both numbers. `label` gives the displayed name of a policy.
    """
    points = [
        (row.name, row.kl, row.gain)
        for row in evaluation.policies
        if row.gain is not None and row.kl is not None and row.name != REFERENCE
    ]
    if not points:
        return None
    trained = [row.name for row in evaluation.policies if row.name not in (REFERENCE, CHAMPION)]
    styles = looks(trained) | {CHAMPION: Look(TEAL, "P")}

    def draw(axes: "Axes") -> None:
        axes.axhline(0, color=MUTED, linewidth=1, linestyle=":")
        handles: list[tuple[str, Artist]] = [
            (REFERENCE, axes.plot([0], [0], "s", color=MUTED, markersize=7)[0])
        ]
        for name, kl, gain in points:
            colour, marker = styles[name]
            bar = axes.errorbar(
                kl.value, gain.value, fmt=marker, color=colour, markersize=7, elinewidth=1.4, capsize=3,
                xerr=reach(kl), yerr=reach(gain),
            )  # fmt: skip
            handles.append((label(name), bar[0]))
        axes.set_xlabel("KL to the reference, nats per sequence (k1)")
        axes.set_ylabel(f"reward gain over {REFERENCE}")
        axes.margins(0.05)
        legend(axes, handles)

    words = "; ".join(
        f"{label(name)} gains {interval(gain, 'gap')} at KL {interval(kl)}" for name, kl, gain in points
    )
    return Figure(
        "frontier",
        "",
        "Up is better, left is closer to the reference. Bars: 95% intervals.",
        f"Reward gain over {REFERENCE} against KL to the reference: {words}",
        draw,
        WIDE,
    )
