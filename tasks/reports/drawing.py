"""Draws figures with matplotlib: inline SVG that follows the page's light or dark theme, or a file.

matplotlib draws in the light theme's colours; the page's style sheet replaces each of them in the dark theme.
Each panel is one small figure that is readable on a phone; wide pages show panels in columns.
"""

import io
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
from matplotlib import style
from matplotlib.figure import Figure as Canvas

from dpo_core.statistics.estimates import Estimate
from tasks.reports.document import Figure

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

WIDE = (5.1, 3.4)

COLOURS = {
    "ink": ("#1c2127", "#e6e9ed"),
    "muted": ("#59636e", "#a3adb8"),
    "rule": ("#d5dae0", "#39414b"),
    "blue": ("#0a5cab", "#77b5f5"),
    "orange": ("#a9480a", "#f2a365"),
    "green": ("#1d7440", "#74c58f"),
    "purple": ("#7b3fb0", "#c7a2f5"),
    "pink": ("#b0246e", "#f58fc0"),
    "teal": ("#0b6b73", "#5fcfd8"),
    "red": ("#b3261e", "#ff8f85"),
}
"""Colours of page and figures, in the light and in the dark theme."""
INK, MUTED, RULE, BLUE, ORANGE, GREEN, PURPLE, PINK, TEAL, RED = (light for light, _ in COLOURS.values())

_STYLE: dict[str, object] = {
    "svg.fonttype": "none",  # real text: small, searchable, in the page's own font
    "font.size": 12,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.formatter.limits": (-3, 4),
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "legend.fontsize": 12,
    "lines.linewidth": 1.6,
}
_LONGEST_NAME = 16  # characters in a legend; three columns of these fit
_SVG = "{http://www.w3.org/2000/svg}"


class Look(NamedTuple):
    """Colour and shape of a policy's marks."""

    colour: str
    marker: str


_LOOKS = (
    *(Look(BLUE, "o"), Look(ORANGE, "^"), Look(GREEN, "D"), Look(PURPLE, "v"), Look(PINK, "P")),
    *(Look(TEAL, "X"), Look(INK, "p"), Look(BLUE, "<"), Look(ORANGE, ">"), Look(GREEN, "h")),
    *(Look(PURPLE, "d"), Look(PINK, "8"), Look(TEAL, "*")),
)


def looks(policies: Sequence[str]) -> dict[str, Look]:
    """Colour and marker for each policy, by position; they repeat after thirteen."""
    return dict(zip(policies, cycle(_LOOKS), strict=False))


def svg(figure: Figure) -> Markup:
    """Draw one panel as SVG. Equal input gives equal bytes."""
    # The salt makes the ids of clip paths and markers unique on a page.
    settings = {**_STYLE, "svg.hashsalt": figure.key}
    root = ElementTree.fromstring(_draw([figure.draw], figure.size, settings))
    for group in root.iter(f"{_SVG}g"):  # matplotlib numbers groups alike in every figure
        group.attrib.pop("id", None)
    for size_attribute in ("width", "height"):
        del root.attrib[size_attribute]
    root.attrib.update({"class": "chart", "role": "img", "aria-label": figure.description})
    ElementTree.register_namespace("", _SVG[1:-1])
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def picture(file: Path, draws: Sequence[Callable[["Axes"], None]], size: tuple[float, float]) -> None:
    """Write panels side by side into one file (PNG or SVG by its name) on a light background.

    Text is drawn as outlines, because the file has no page's font.
    """
    settings = {"svg.fonttype": "path", "svg.hashsalt": file.name, "figure.facecolor": "#ffffff"}
    file.write_bytes(_draw(draws, size, _STYLE | settings, form=file.suffix[1:]))


def _draw(
    draws: Sequence[Callable[["Axes"], None]],
    size: tuple[float, float],
    settings: dict[str, object],
    form: str = "svg",
) -> bytes:
    buffer = io.BytesIO()
    # Start from "default", so that a matplotlibrc on the machine does not change the page.
    with style.context("default"), matplotlib.rc_context(settings):
        canvas = Canvas(figsize=size, layout="constrained")
        for axes, draw in zip(canvas.subplots(1, len(draws), squeeze=False)[0], draws, strict=True):
            draw(axes)
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type") if form == "svg" else ("Software",))
        transparent = "figure.facecolor" not in settings
        canvas.savefig(buffer, format=form, transparent=transparent, dpi=160, metadata=nothing)
    return buffer.getvalue()


def reach(estimate: Estimate) -> list[list[float]]:
    """Lengths of an error bar below and above; never negative, although a percentile interval may narrowly
    exclude its own estimate."""
    return [[max(0.0, estimate.value - estimate.low)], [max(0.0, estimate.high - estimate.value)]]


def legend(axes: "Axes", handles: Sequence[tuple[str, "Artist"]]) -> None:
    """A legend above the axes, in three columns; names in it never lie on marks or on each other."""
    names = [name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…" for name, _ in handles]
    shown = axes.legend(
        [handle for _, handle in handles], names, loc="lower left", bbox_to_anchor=(0, 1), ncols=3,
        borderaxespad=0, handlelength=1.8, columnspacing=1.1, handletextpad=0.5,
    )  # fmt: skip
    for text in shown.get_texts():
        text.set_parse_math(False)  # policy names may contain dollar signs
