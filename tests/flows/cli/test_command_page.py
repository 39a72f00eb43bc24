"""The docs page of the commands: what the command line itself says."""

from pathlib import Path

import typer.main

from flows.cli.main import app
from flows.commands.command_page import markdown

PAGE = Path(__file__).resolve().parents[3] / "flows" / "docs" / "commands.md"


def test_the_page_of_the_docs_is_the_command_line() -> None:
    """Renew it: python -c "import typer.main as t; from flows.cli.main import app; from
    flows.commands.command_page import markdown; print(markdown(t.get_command(app)), end='')"."""
    assert PAGE.read_text() == markdown(typer.main.get_command(app))


def test_a_new_command_has_its_section_with_arguments_options_and_defaults() -> None:
    tool, inner = typer.Typer(), typer.Typer()

    @inner.command("paint")
    def paint(
        what: str,
        colour: str = typer.Option("red", help="Red | blue."),
        gloss: bool = typer.Option(True, help="Shine."),
    ) -> None:
        """Paint it.

        Twice.
        """

    @inner.command("dry")
    def dry() -> None:
        """Wait."""

    tool.add_typer(inner, name="house")
    page = markdown(typer.main.get_command(tool))
    assert "## dpo house paint\n\n`dpo house paint WHAT`\n\nPaint it.\n\nTwice.\n" in page
    assert "| `--colour COLOUR` | Red \\| blue. Default: `red`. |" in page
    assert "| `--gloss`, `--no-gloss` | Shine. Default: `--gloss`. |" in page
    assert page.endswith("## dpo house dry\n\n`dpo house dry`\n\nWait.\n")
