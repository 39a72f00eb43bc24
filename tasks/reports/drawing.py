"""Draws figures with matplotlib: inline SVG that follows the page's light or dark theme, or a file.

matplotlib draws with placeholder colours, which are then replaced by CSS variables of the page (with fallback
colours for use outside the page). Each panel is one small figure that is readable on a phone; wide pages show
panels in columns.
"""

import io
import re
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import matplotlib
from markupsafe import Markup, escape
from matplotlib import style
from matplotlib.figure import Figure as Canvas

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANEL, WIDE = (4.6, 3.0), (5.1, 3.4)  # inches of 72 units: close to CSS pixels where the page shows them

# Placeholder colour for matplotlib -> (CSS variable, fallback)
_THEME = {
    "#010201": ("--ink", "#1c2127"),
    "#010202": ("--muted", "#59636e"),
    "#010203": ("--rule", "#d5dae0"),
    "#010204": ("--blue", "#0a5cab"),
    "#010205": ("--orange", "#a9480a"),
    "#010206": ("--green", "#1d7440"),
    "#010207": ("--purple", "#7b3fb0"),
    "#010208": ("--pink", "#b0246e"),
    "#010209": ("--teal", "#0b6b73"),
    "#010210": ("--red", "#b3261e"),
}
INK, MUTED, RULE, BLUE, ORANGE, GREEN, PURPLE, PINK, TEAL, RED = _THEME
Palette = dict[str, str]  # placeholder colour -> drawn colour
THEMED: Palette = {colour: colour for colour in _THEME}
LIGHT: Palette = {colour: fallback for colour, (_, fallback) in _THEME.items()}

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


class Figure(NamedTuple):
    """One panel: its title, the SVG, and a line of text below it."""

    title: str
    svg: Markup
    note: str


def svg(
    key: str, title: str, description: str, draw: Callable[["Axes"], None], size: tuple[float, float] = PANEL
) -> Markup:
    """Draw one panel as SVG. Equal input gives equal bytes; `key` makes its ids unique on a page."""
    text = _draw([draw], size, {**_STYLE, "svg.hashsalt": key})
    return Markup(_inline(text.decode(), key, title, description))


def picture(file: Path, draws: Sequence[Callable[["Axes"], None]], size: tuple[float, float]) -> None:
    """Write panels side by side into one file (PNG or SVG by its name) on a light background.

    The panels use the colours of `LIGHT`. Text is drawn as outlines, because the file has no page's font.
    """
    light = {
        key: LIGHT.get(value, value) if isinstance(value, str) else value for key, value in _STYLE.items()
    }
    style = {**light, "svg.fonttype": "path", "svg.hashsalt": file.name, "figure.facecolor": "#ffffff"}
    file.write_bytes(_draw(draws, size, style, form=file.suffix[1:]))


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


def reach(value: float, low: float, high: float) -> list[list[float]]:
    # A percentile interval may narrowly exclude its own estimate; matplotlib rejects negative lengths.
    return [[max(0.0, value - low)], [max(0.0, high - value)]]


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "stage"


def _inline(document: str, key: str, title: str, description: str) -> str:
    """A matplotlib SVG document as an element of a page: themed, named, without what leaks into the page."""
    view_box = re.search(r'viewBox="[^"]+"', document)
    assert view_box, "matplotlib always writes a viewBox"
    body = document[document.index(">", view_box.end()) + 1 : document.rindex("</svg>")]
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
