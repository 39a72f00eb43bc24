"""What commands print is shown as it is."""

import pytest
from rich.table import Table

ODD = "a[/b]c [red]x :cat: \\[bold]"


def test_paths_and_names_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    from flows.commands.terminal import terminal

    terminal().print(f"page    {ODD}")
    table = Table(title=ODD)
    table.add_column(ODD)
    table.add_row(ODD)
    terminal().print(table)
    terminal(stderr=True).print(ODD)
    out, err = capsys.readouterr()
    assert out.count(ODD) == 4
    assert ODD in err
