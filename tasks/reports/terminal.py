"""Renders the brief sections of a report for a terminal of 80 columns."""

from collections.abc import Sequence

from rich.table import Table as Grid
from rich.text import Text

from tasks.reports.document import (
    Block,
    Bullets,
    Cell,
    Document,
    Paragraph,
    Subheading,
    Table,
    Terms,
    printable,
    text_of,
)

_COLOURS = {"good": "green", "bad": "red", "unclear": "yellow", "plain": "default"}
_DIGEST = 12


def terminal(document: Document) -> Grid:
    """Headline, reasons and brief sections; nothing is read as markup."""
    page = Grid.grid(padding=(0, 0))
    page.add_row(_text(document.headline, style=f"bold {_COLOURS[document.tone]}"))
    _add(page, document.reasons, explain=True)
    for section in document.shown("brief"):
        if not section.lead:
            page.add_row(_text(section.title, style="bold"))
        _add(page, section.blocks, explain=False)
    page.add_row(_text(document.footer))
    return page


def _add(page: Grid, blocks: Sequence[Block], explain: bool) -> None:
    for block in blocks:
        match block:
            case Paragraph() if explain:
                page.add_row(_text(text_of(block.text)))
            case Subheading():
                page.add_row(_text(block.text, style="bold"))
            case Bullets():
                for item in block.items:
                    page.add_row(_text(f"{item.mark}: {item.text}" if item.mark else item.text))
            case Terms() if block.style == "alarms":
                for label, value in block.items:
                    page.add_row(_text(f"! {label}: {value}", style="yellow"))
            case Terms():
                grid = Grid.grid(padding=(0, 2))
                for label, value in block.items:
                    grid.add_row(_text(label), _text(str(value)))
                page.add_row(grid)
            case Table() if any(line.brief for line in block.lines):
                page.add_row(_table(block))


def _table(table: Table) -> Grid:
    shown = Grid()
    shown.add_column(_text(table.first))
    brief = [index for index, column in enumerate(table.columns) if column.brief]
    for index in brief:
        column = table.columns[index]
        shown.add_column(_text(column.name), justify="right" if column.kind == "number" else "left")
    lines = [line for line in table.lines if line.brief]
    tall = any(cell.interval or cell.more for line in lines for cell in line.cells)
    for line, before in zip(lines, [None, *lines], strict=False):
        if line.group and (before is None or before.group != line.group):
            shown.add_row(_text(line.group, style="bold"))
        label = _text(line.label, style="bold" if line.group and line.main else "")
        if line.hint and table.brief_hints:
            label.append(f"\n{line.hint}", style="not bold")
        shown.add_row(label, *(_cell(line.cells[index]) for index in brief), end_section=tall)
    return shown


def _cell(cell: Cell) -> Text:
    value = cell.value if isinstance(cell.value, str) else text_of(cell.value)[:_DIGEST]
    return _text("\n".join(part for part in (value, cell.interval, cell.more) if part))


def _text(words: str, style: str = "") -> Text:
    return Text(printable(words), style)
