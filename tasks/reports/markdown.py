"""Renders a report as GitHub Markdown: without figures, samples, and what the page folds."""

import re
from collections.abc import Sequence

from tasks.reports.document import (
    Block,
    Bullets,
    Code,
    Detail,
    Document,
    Paragraph,
    Subheading,
    Table,
    Terms,
    printable,
    text_of,
)


def markdown(document: Document, *, brief: bool = False) -> str:
    """The whole report; `brief`: only the sections that the terminal shows, too."""
    details: Sequence[Detail] = ("brief",) if brief else ("brief", "text")
    parts = [f"# {escaped(document.headline)}", *_blocks(document.reasons)]
    for section in document.shown(*details):
        parts += [f"## {escaped(section.title)}", *_blocks(section.blocks)]
    return "\n\n".join(part for part in parts if part) + "\n"


def escaped(text: object) -> str:
    """A text on one line, without markup, HTML or cell border."""
    flat = printable(" ".join(str(text).split()))
    return re.sub(r"([\\`*_{}\[\]<>|#~$])", r"\\\1", flat.replace("&", "&amp;"))


def _blocks(blocks: Sequence[Block]) -> list[str]:
    parts = []
    for block in blocks:
        match block:
            case Paragraph():
                parts.append(escaped(text_of(block.text)))
            case Subheading():
                parts.append(f"### {escaped(block.text)}")
            case Bullets():
                marked = (f"{item.mark}: {item.text}" if item.mark else item.text for item in block.items)
                parts.append("\n".join(f"- {escaped(text)}" for text in marked))
            case Terms():
                listed = (f"- **{escaped(label)}**: {escaped(value)}" for label, value in block.items)
                parts.append("\n".join(listed))
            case Table():
                parts += [escaped(block.caption), _table(block)]
            case Code():
                fence = "`" * max(3, 1 + max(map(len, re.findall("`+", block.text)), default=0))
                parts.append(f"{fence}sh\n{printable(block.text)}\n{fence}")
    return parts


def _table(table: Table) -> str:
    head = [table.first, *(column.name for column in table.columns)]
    rows = [
        [": ".join(filter(None, (line.group, line.label))) + (f" ({line.hint})" if line.hint else ""),
         *map(str, line.cells)]
        for line in table.lines
    ]  # fmt: skip
    lines = [[escaped(name) for name in head], ["---"] * len(head)]
    lines += [[escaped(text) for text in row] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
