"""Draws a study's two figures: reward against KL, and reward against compute.

Each policy has the same colour and shape in both figures. Each mark is one setting, the mean of its seeds.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from dpo_core.statistics.format import interval, number, scaled
from dpo_core.study import PolicySummary, Study, StudySummary
from tasks.recipe.policies import REFERENCE
from tasks.reports.document import Figure
from tasks.reports.drawing import MUTED, WIDE, legend, looks, picture, reach

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes


def figures(study: Study, summary: StudySummary) -> list[Figure]:
    """The figures of reward against KL and against compute; empty if there is no policy to draw."""
    if not study.drawn_policies():
        return []
    return [
        Figure(
            "reward-kl",
            "Reward against KL",
            "Up is better, left is closer to the reference. Bars: 95% intervals. Lines: the reward that "
            "mixtures of a policy's points reach, dotted beyond its largest KL.",
            f"Reward against KL to the reference: {_kl_words(study, summary)}",
            _kl(study, summary),
            WIDE,
        ),
        Figure(
            "reward-flops",
            "Reward against compute",
            "Up is better, left is cheaper. Bars: 95% intervals. Lines: the highest reward for at most that "
            "many FLOPs.",
            f"Reward against compute: {_flops_words(study, summary)}",
            _flops(study, summary),
            WIDE,
        ),
    ]


def write_picture(study: Study, summary: StudySummary, file: Path) -> None:
    """Write both figures side by side into one file (PNG or SVG by its name) on a light background."""
    picture(file, [_kl(study, summary), _flops(study, summary)], (2 * WIDE[0], WIDE[1] + 0.3))


# ------------------------------------------------------------------------------------------------ drawing


def _kl(study: Study, summary: StudySummary) -> Callable[["Axes"], None]:
    rows = _drawn(study, summary)
    end = max([summary.kl_end, *(row.reach for row in rows)])

    def draw(axes: "Axes") -> None:
        look = looks(study.policies())
        handles: list[tuple[str, Artist]] = []
        for row in rows:
            colour, marker = look[row.policy]
            for x, y, style in _envelope_lines(row, end):
                axes.plot(x, y, style, color=colour, linewidth=1.4, zorder=2)
            for setting in summary.rows(row.policy):
                axes.errorbar(
                    setting.kl.value, setting.reward.value, fmt=marker, color=colour, markersize=6,
                    elinewidth=1, zorder=3, xerr=reach(setting.kl), yerr=reach(setting.reward),
                )  # fmt: skip
            handles.append((row.policy, axes.plot([], [], f"-{marker}", color=colour, markersize=6)[0]))
        if summary.best_of:
            best = sorted((best.kl_bound, best.reward.value) for best in summary.best_of)
            line = axes.plot(
                [kl for kl, _ in best], [reward for _, reward in best], "--.", color=MUTED, linewidth=1.4,
                markersize=5, zorder=1,
            )[0]  # fmt: skip
            handles.append((f"best of {max(best.n for best in summary.best_of)}", line))
        reference = axes.plot([0], [summary.reference.value], "s", color=MUTED, markersize=7, zorder=4)[0]
        axes.set_xlabel("KL to the reference, nats per sequence (k1)")
        axes.set_ylabel("reward")
        axes.margins(0.04, 0.08)
        legend(axes, [*handles, (REFERENCE, reference)])

    return draw


def _envelope_lines(row: PolicySummary, end: float) -> list[tuple[list[float], list[float], str]]:
    """The envelope, solid up to the policy's largest KL and dotted beyond."""
    corners = row.envelope
    top, far = corners[-1][1], max(row.reach, corners[-1][0])
    solid = [*corners, (far, top)]
    lines = [([x for x, _ in solid], [y for _, y in solid], "-")]
    return [*lines, ([far, end], [top, top], ":")] if far < end else lines


def _flops(study: Study, summary: StudySummary) -> Callable[["Axes"], None]:
    rows = _drawn(study, summary)
    # A logarithmic axis cannot show a cost of 0.
    costs = [s.cost.flops for row in rows for s in summary.rows(row.policy) if s.cost.flops > 0] or [1.0]

    def draw(axes: "Axes") -> None:
        look = looks(study.policies())
        handles: list[tuple[str, Artist]] = []
        for row in rows:
            colour, marker = look[row.policy]
            stairs = _stairs(row, summary.reference.value, max(costs))
            axes.plot(
                [x for x, _ in stairs], [y for _, y in stairs], color=colour, linewidth=1, alpha=0.5,
                zorder=2, drawstyle="steps-post",
            )  # fmt: skip
            for setting in summary.rows(row.policy):
                if setting.cost.flops > 0:
                    axes.errorbar(
                        setting.cost.flops, setting.reward.value, fmt=marker, color=colour, markersize=6,
                        elinewidth=1, zorder=3, yerr=reach(setting.reward),
                    )  # fmt: skip
            handles.append((row.policy, axes.plot([], [], f"-{marker}", color=colour, markersize=6)[0]))
        reference = axes.axhline(summary.reference.value, color=MUTED, linewidth=1.2, linestyle=":")
        axes.set_xlabel("compute after SFT, FLOPs (T: 10¹², P: 10¹⁵, E: 10¹⁸)")
        axes.set_ylabel("reward")
        axes.margins(y=0.08)
        _log_axis(axes, min(costs), max(costs))
        legend(axes, [*handles, (REFERENCE, reference)])

    return draw


def _stairs(row: PolicySummary, reference: float, dearest: float) -> list[tuple[float, float]]:
    """The policy's staircase from the reference's reward to the right edge; costs of 0 are left out."""
    steps = [step for step in row.staircase if step[0] > 0]
    return [(steps[0][0], reference), *steps, (dearest, steps[-1][1])] if steps else []


def _log_axis(axes: "Axes", low: float, high: float) -> None:
    """Set a logarithmic axis from just below `low` to just above `high`, with two to five labels."""
    margin = max(1.3, (6 / (high / low)) ** 0.5)
    low, high = low / margin, high * margin
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    narrow = high / low < 40
    axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5) if narrow else (1,), numticks=5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: scaled(value, "")))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _drawn(study: Study, summary: StudySummary) -> list[PolicySummary]:
    drawn = study.drawn_policies()
    return [row for row in summary.policies if row.policy in drawn]


# ------------------------------------------------------------------------------------------------ in words


def _kl_words(study: Study, summary: StudySummary) -> str:
    parts = [f"SFT has reward {number(summary.reference.value)} at KL 0"]
    for row in _drawn(study, summary):
        heights = ", ".join(
            f"{interval(at.reward)} at KL {at.kl:g}{'' if at.reached else ', beyond its largest KL'}"
            for at in row.at_kl
        )
        parts.append(f"{row.policy}, {_settings(row)} to KL {number(row.reach)}: {heights}")
    parts += [
        f"the best of {best.n} of SFT has {number(best.reward.value)} at KL {number(best.kl_bound)} or less"
        for best in summary.best_of
    ]
    return "; ".join(parts)


def _flops_words(study: Study, summary: StudySummary) -> str:
    parts = [f"SFT has reward {number(summary.reference.value)}"]
    for row in _drawn(study, summary):
        stairs = ", ".join(
            f"{number(reward)} for {scaled(flops, 'FLOP')}" for flops, reward in row.staircase if flops > 0
        )
        parts.append(f"{row.policy}, {_settings(row)}: {stairs or 'no compute was recorded'}")
    return "; ".join(parts)


def _settings(row: PolicySummary) -> str:
    return f"{row.settings} point{'s' if row.settings > 1 else ''}"
