"""The document model of reports: sections made of blocks, which `html`, `markdown` and `terminal` render."""

import re
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Literal, NamedTuple

from dpo_core.statistics.estimates import Estimate
from dpo_core.statistics.format import Kind, interval, number, percent
from tasks.reports.run_report import Sample

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Tone = Literal["good", "bad", "unclear", "plain"]
Detail = Literal["brief", "text", "page"]
"""Where a section is shown: `brief` everywhere, `text` on the page and in Markdown, `page` on the page."""


class Span(NamedTuple):
    """A part of a text: plain, code, or a digest that the page shortens; with or without a link."""

    text: str
    kind: Literal["", "code", "digest"] = ""
    href: str = ""


Words = str | Sequence[Span]


def spans(words: Words) -> Sequence[Span]:
    """A text as spans."""
    return [Span(words)] if isinstance(words, str) else words


def text_of(words: Words) -> str:
    """A text without markup."""
    return "".join(span.text for span in spans(words))


def printable(text: str) -> str:
    """A text without control characters, which would move a terminal's cursor or change its colours."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", text)


class Cell(NamedTuple):
    """One value: `1.24`, its interval `1.02 to 1.46`, and a remark below."""

    value: Words
    interval: str = ""
    more: str = ""
    tone: Tone | Literal[""] = ""
    """Colour on the page; the text gives the same information."""
    bar: Sequence[float] = ()
    """Where the page draws no difference, low end, value and high end below: 0 (left) to 100 (right)."""

    def __str__(self) -> str:
        shown = f"{text_of(self.value)} [{self.interval}]" if self.interval else text_of(self.value)
        return f"{shown}, {self.more}" if self.more else shown


DASH = Cell("–")


def cell(value: Estimate | float | None, kind: Kind = "number", more: str = "") -> Cell:
    """The cell of a number or of an estimate with its interval; a dash for None."""
    if value is None:
        return DASH
    if isinstance(value, Estimate):
        return Cell(*interval(value, kind), more)
    return Cell(percent(value) if kind == "share" else number(value, kind == "gap"), more=more)


class Column(NamedTuple):
    """A column of a table."""

    name: str
    kind: Literal["number", "text", "long"] = "number"
    brief: bool = True
    """Whether the terminal shows it, in 80 characters."""


class Line(NamedTuple):
    """A row of a table: label with a hint, then one cell for each column."""

    label: str
    cells: Sequence[Cell]
    hint: str = ""
    group: str = ""
    """The heading above consecutive lines of the same group."""
    main: bool = True
    """Whether the label is bold."""
    brief: bool = True
    key: str = ""
    """Anchor on the page."""


class Table(NamedTuple):
    """A table whose first column holds the lines' labels; `name` identifies it for screen readers."""

    name: str
    caption: str
    first: str
    columns: Sequence[Column]
    lines: Sequence[Line]
    wide: bool = False
    """Whether the page keeps the first column visible while the others scroll."""
    brief_hints: bool = True
    """Whether the terminal shows the lines' hints."""


class Paragraph(NamedTuple):
    text: Words
    small: bool = True


class Subheading(NamedTuple):
    text: str


class Item(NamedTuple):
    """One line of a list; with a mark, the result of a rule."""

    text: str
    mark: str = ""
    tone: Tone = "plain"
    rule: str = ""


class Bullets(NamedTuple):
    items: Sequence[Item]


class Terms(NamedTuple):
    """Labels with their values: a list, large numbers (`facts`), or alarms."""

    items: Sequence[tuple[str, Cell]]
    style: Literal["list", "facts", "alarms"] = "list"


class Code(NamedTuple):
    name: str
    text: str


class Figure(NamedTuple):
    """One panel, drawn when the page is rendered."""

    key: str
    """Unique on a page."""
    title: str
    """Empty if the section's title says it."""
    note: str
    """A line below the title."""
    description: str
    """The figure in words, for readers who do not see it."""
    draw: Callable[["Axes"], None]
    size: tuple[float, float] = (4.6, 3.0)
    """Inches of 72 units: close to CSS pixels where the page shows them."""


class Figures(NamedTuple):
    figures: Sequence[Figure]
    wide: bool = False


class Link(NamedTuple):
    """One box of a chain."""

    label: str
    name: str
    sha256: str = ""
    """Digest or id; empty if there is none."""


class Chain(NamedTuple):
    links: Sequence[Link]


class Samples(NamedTuple):
    """Answers of all models, side by side; `first` numbers the prompts."""

    samples: Sequence[Sample]
    first: int = 1


class Fold(NamedTuple):
    """Blocks that the page shows on a click; the other renderers leave them out."""

    summary: str
    blocks: Sequence["Block"]


Block = Paragraph | Subheading | Bullets | Terms | Table | Code | Figures | Chain | Samples | Fold


class Section(NamedTuple):
    """A section; without blocks it is left out, and the page names it at its end with the reason `absent`."""

    key: str
    title: str
    blocks: Sequence[Block] = ()
    detail: Detail = "text"
    absent: str = ""
    lead: bool = False
    """Whether it stands directly under the headline, before the table of contents."""


class Document(NamedTuple):
    """A report: a headline with its reasons, then sections."""

    title: str
    eyebrow: str
    time: datetime
    headline: str
    tone: Tone
    reasons: Sequence[Block]
    sections: Sequence[Section]
    footer: str = "Intervals are at 95%, resampled by prompt."

    def shown(self, *details: Detail) -> list[Section]:
        """The sections that have blocks and one of these levels of detail."""
        return [part for part in self.sections if part.blocks and part.detail in details]
