"""The run page's figures: inline SVG in the page's light or dark theme, each also said in words.

matplotlib draws with stand-in colours; each is then replaced by a CSS variable of the page (with a fallback,
so that a figure cut out of the page still has its colours). One panel is one small figure: it can be read on
a phone at its natural size, and the page lays the panels out in columns where there is room.
"""

import io
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from markupsafe import Markup, escape

from tasks.report import Evaluation
from tasks.report_curves import series, start_and_end
from tasks.report_numbers import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANEL, WIDE = (4.6, 3.0), (5.1, 3.4)  # inches of 72 units: close to CSS pixels where the page shows them
MAX_POINTS = 200  # a longer curve is averaged over neighbours: more points cannot be told apart at this size

# Stand-in colour for matplotlib -> (CSS variable, fallback)
_THEME = {
    "#010201": ("--ink", "#1c2127"),
    "#010202": ("--muted", "#59636e"),
    "#010203": ("--rule", "#d5dae0"),
    "#010204": ("--blue", "#0a5cab"),
    "#010205": ("--orange", "#a9480a"),
    "#010206": ("--green", "#1d7440"),
}
_INK, _MUTED, _RULE, _BLUE, _ORANGE, _GREEN = _THEME
_POLICY = {"SFT": (_MUTED, "s"), "DPO": (_BLUE, "o"), "PPO": (_ORANGE, "^"), "GRPO": (_GREEN, "D")}

_STYLE: dict[str, object] = {
    "svg.fonttype": "none",  # real text: small, searchable, in the page's own font
    "font.size": 12,
    "text.color": _INK,
    "axes.edgecolor": _RULE,
    "axes.labelcolor": _MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.formatter.limits": (-3, 4),
    "grid.color": _RULE,
    "grid.linewidth": 0.7,
    "xtick.color": _RULE,
    "ytick.color": _RULE,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _MUTED,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.labelcolor": _INK,
    "legend.fontsize": 12,
    "lines.linewidth": 1.6,
}


class Figure(NamedTuple):
    """One drawn panel: its title, the SVG, and one line of numbers below it."""

    title: str
    svg: Markup
    note: str


class Panel(NamedTuple):
    """Which metrics share one pair of axes."""

    title: str
    unit: str
    metrics: tuple[tuple[str, str], ...]
    """(metric, label) in the order blue, orange."""
    baseline: float | None = None
    """A value to compare with, drawn dotted: 0 for a margin, 0.5 for an accuracy, 1 for a ratio."""


PANELS = (
    Panel("Loss", "", (("loss", "loss"),)),
    Panel(
        "Implicit rewards", "nats × β", (("rewards/chosen", "chosen"), ("rewards/rejected", "rejected")), 0.0
    ),
    Panel("Reward margin", "nats × β", (("rewards/margins", "margin"),), 0.0),
    Panel("Preference accuracy", "share of pairs", (("rewards/accuracies", "accuracy"),), 0.5),
    Panel("Log-probability of chosen", "nats", (("logps/chosen", "log p(chosen)"),)),
    Panel("Accuracy", "share of pairs", (("accuracy", "accuracy"),), 0.5),
    Panel(
        "Score", "reward", (("objective/scores", "score"), ("objective/rlhf_reward", "score minus KL cost"))
    ),
    Panel("Known reward, not trained on", "reward", (("objective/gold_scores", "known reward"),)),
    Panel("KL to the reference", "nats", (("objective/kl", "KL"),), 0.0),
    Panel("Probability ratio", "new / old", (("val/ratio", "ratio"),), 1.0),
    Panel("Approximate KL of an update", "nats", (("policy/approxkl_avg", "KL"),), 0.0),
    Panel("Reward", "reward", (("reward", "reward"),)),
    Panel("KL to the reference", "nats", (("kl", "KL"),), 0.0),
    Panel("Completion length", "tokens", (("completions/mean_length", "length"),)),
    Panel("Gradient norm", "", (("grad_norm", "gradient norm"),)),
)


def curve_figures(stage: str, rows: Sequence[dict[str, float]]) -> list[Figure]:
    """One figure for each panel of which the stage logged a metric. `eval_` metrics join theirs, dashed."""
    figures = []
    for index, panel in enumerate(PANELS):
        lines = _lines(panel, rows)
        if lines:
            figures.append(_curve(f"{_slug(stage)}-{index}", stage, panel, lines))
    return figures


class _Line(NamedTuple):
    label: str
    steps: list[float]
    values: list[float]
    colour: str
    held_out: bool


def _lines(panel: Panel, rows: Sequence[dict[str, float]]) -> list[_Line]:
    lines = []
    for (metric, label), colour in zip(panel.metrics, (_BLUE, _ORANGE), strict=False):
        for prefix, suffix in (("", ""), ("eval_", ", held out")):
            steps, values = series(rows, prefix + metric)
            if values:
                lines.append(_Line(label + suffix, *_thin(steps, values), colour, bool(prefix)))
    return lines


def _thin(steps: list[float], values: list[float]) -> tuple[list[float], list[float]]:
    """Neighbours averaged until at most MAX_POINTS are left; the last group may be smaller."""
    size = -(-len(values) // MAX_POINTS)
    if size <= 1:
        return steps, values
    groups = [slice(i, i + size) for i in range(0, len(values), size)]
    means = [(sum(steps[g]) / len(steps[g]), sum(values[g]) / len(values[g])) for g in groups]
    return [x for x, _ in means], [y for _, y in means]


def _curve(key: str, stage: str, panel: Panel, lines: list[_Line]) -> Figure:
    from matplotlib.ticker import MaxNLocator

    def draw(axes: "Axes") -> None:
        if panel.baseline is not None:
            axes.axhline(panel.baseline, color=_MUTED, linewidth=1, linestyle=":")
        covered = {line.colour for line in lines if line.held_out}  # pale, so that the rarer points show
        for index, line in enumerate(lines):
            # Shape tells the lines apart as well as colour does: dashes for the second, dots for held out.
            style = "--" if line.colour != _BLUE else "-"
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
    return Figure(panel.title, _svg(key, f"{panel.title}, {stage}", words, draw), note)


def frontier_figure(evaluation: Evaluation) -> Figure | None:
    """Reward gained over SFT against the KL paid for it, with 95 % intervals; SFT is the origin.

    The paired gain is drawn, not the reward: its interval says whether a policy differs from SFT.
    None where no policy has both numbers.
    """
    points = [row for row in evaluation.policies if row.gain is not None and row.kl is not None]
    points = sorted(
        (row for row in points if row.name != "SFT"), key=lambda row: row.kl.value if row.kl else 0
    )
    if not points:
        return None

    def draw(axes: "Axes") -> None:
        axes.axhline(0, color=_MUTED, linewidth=1, linestyle=":")
        axes.plot([0], [0], _POLICY["SFT"][1], color=_POLICY["SFT"][0], markersize=7)
        axes.annotate("SFT", (0, 0), (7, -14), textcoords="offset points", color=_INK, fontweight="bold")
        # From left to right, each label on its own side: policies that coincide can still be told apart.
        sides = [((-7, 6), "right"), ((7, 6), "left"), ((-7, -14), "right")]
        for row, (offset, side) in zip(points, sides, strict=False):
            assert row.gain is not None
            assert row.kl is not None
            colour, marker = _POLICY[row.name]
            axes.errorbar(
                row.kl.value, row.gain.value, fmt=marker, color=colour, markersize=7, elinewidth=1.4,
                capsize=3,
                xerr=_reach(row.kl.value, row.kl.low, row.kl.high),
                yerr=_reach(row.gain.value, row.gain.low, row.gain.high),
            )  # fmt: skip
            axes.annotate(
                row.name, (row.kl.value, row.gain.value), offset, textcoords="offset points", ha=side,
                color=_INK, fontweight="bold",
            )  # fmt: skip
        axes.set_xlabel("KL to the reference, nats per sequence (k1)")
        axes.set_ylabel("reward gain over SFT")
        axes.margins(0.12)
        left, right = axes.get_xlim()
        right = max(1.0, right)  # differences far below one nat are noise
        axes.set_xlim(min(left, -0.16 * right), right)  # room for a label left of the origin

    words = "; ".join(
        f"{row.name} gains {number(row.gain.value, signed=True)} "
        f"({number(row.gain.low)} to {number(row.gain.high)}) "
        f"at KL {number(row.kl.value)} ({number(row.kl.low)} to {number(row.kl.high)})"
        for row in points
        if row.gain and row.kl
    )
    svg = _svg("frontier", "Reward gain over SFT against KL to the reference", words, draw, WIDE)
    return Figure(
        "Reward against KL", svg, "Up is better, left is closer to the reference. Bars: 95% intervals."
    )


def _reach(value: float, low: float, high: float) -> list[list[float]]:
    # A percentile interval may miss its own estimate by a hair; matplotlib refuses a negative length.
    return [[max(0.0, value - low)], [max(0.0, high - value)]]


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "stage"


def _svg(
    key: str, title: str, description: str, draw: Callable[["Axes"], None], size: tuple[float, float] = PANEL
) -> Markup:
    """Draw one panel. The same input gives the same text, byte for byte; ids are unique by `key`."""
    import matplotlib
    from matplotlib import style
    from matplotlib.figure import Figure as Canvas

    buffer = io.StringIO()
    # "default" first: a matplotlibrc on the machine must not change the page.
    with style.context("default"), matplotlib.rc_context({**_STYLE, "svg.hashsalt": key}):
        canvas = Canvas(figsize=size, layout="constrained")
        draw(canvas.add_subplot())
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        canvas.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    return Markup(_inline(buffer.getvalue(), key, title, description))


def _inline(svg: str, key: str, title: str, description: str) -> str:
    """A matplotlib SVG document as an element of a page: themed, named, without what leaks into the page."""
    view_box = re.search(r'viewBox="[^"]+"', svg)
    assert view_box, "matplotlib always writes a viewBox"
    body = svg[svg.index(">", view_box.end()) + 1 : svg.rindex("</svg>")]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.S)
    body = re.sub(r"<style.*?</style>", "", body, flags=re.S)  # its `*` selector would reach the whole page
    body = re.sub(r" font-family: [^;\"]+;?", "", body)
    used = set(re.findall(r'xlink:href="#([^"]+)"|url\(#([^)]+)\)', body))
    kept = {name for pair in used for name in pair if name}
    body = re.sub(r' id="([^"]+)"', lambda m: f' id="{key}-{m[1]}"' if m[1] in kept else "", body)
    body = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{key}-", body).replace("xlink:href", "href")
    # A tenth of a unit is below one device pixel. Inside tags only: tick labels are text and stay.
    body = re.sub(r"<[^>]+>", lambda tag: re.sub(r"(\d+\.\d)\d+", r"\1", tag[0]), body)
    for stand_in, (variable, fallback) in _THEME.items():
        body = body.replace(stand_in, f"var({variable}, {fallback})")
    body = re.sub(r"\s*\n\s*", " ", body).replace("> <", "><")
    return (
        f'<svg class="chart" {view_box[0]} xmlns="http://www.w3.org/2000/svg" role="img" '
        f'aria-labelledby="{key}-title {key}-desc"><title id="{key}-title">{escape(title)}</title>'
        f'<desc id="{key}-desc">{escape(description)}</desc>{body}</svg>'
    )
