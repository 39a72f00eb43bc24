"""Renders a report as its page: one HTML file without script or network access."""

import re
from urllib.parse import urlsplit

from jinja2 import Environment, PackageLoader, StrictUndefined

from dpo_core.statistics.format import number
from tasks.reports.document import Document, spans
from tasks.reports.drawing import COLOURS, svg

MAX_TEXT = 1500  # characters of a prompt or completion that are shown


def html(document: Document) -> str:
    """The whole page: self-contained, text from models and data escaped.

    Sections without data are left out and listed at the end with the reason. At most `MAX_TEXT` characters of
    each sample's text are shown; the page states what was cut.
    """
    environment = Environment(
        loader=PackageLoader("tasks.reports", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        number=number, minus=_minus, clip=_clip, link=_link, spans=spans, svg=svg,
        kind=lambda block: type(block).__name__,
    )  # fmt: skip
    return environment.get_template("page.html.j2").render(document=document, colours=COLOURS)


def _minus(text: object) -> str:
    """Replace the hyphen before a number by a minus sign; keep other hyphens."""
    return re.sub(r"(?<!\S)([(\[]?)-(?=\d)", r"\1−", str(text))


def _clip(text: str) -> str:
    if len(text) <= MAX_TEXT:
        return text
    return f"{text[:MAX_TEXT]}… ({len(text) - MAX_TEXT:,} more characters)"


def _link(uri: str) -> str:
    """The address if it is safe to link (an anchor, http, https, file); else empty (`javascript:`, paths)."""
    return uri if uri.startswith("#") or urlsplit(uri).scheme in ("http", "https", "file") else ""
