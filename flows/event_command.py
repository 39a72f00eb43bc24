"""`dpo event`: tell the server what happened outside of it, so that triggers can act on it."""

from pathlib import Path
from typing import Annotated

import typer

from dpo_core.errors import DataError
from flows.server import server

app = typer.Typer(help="Tell the server what happened outside of it.", no_args_is_help=True)

NEW_DATA = "dpo.dataset.new"


@app.callback()
def _group() -> None:
    """A group, so that further events have their place."""


@app.command("new-data")
def new_data(
    path: Annotated[str, typer.Argument(help="A data file or a folder, as workers see it.")],
    name: Annotated[str | None, typer.Option(help="What to call it; by default the file's name.")] = None,
) -> None:
    """Say that there is a new data set; deployments that wait for one run on it."""
    from tasks.events import send

    whole = Path(path).expanduser().absolute()
    if not whole.exists():
        raise DataError(f"there is no data at {whole}", "Name a file or a folder")
    called = name or whole.name.partition(".")[0]
    with server() as client:
        event = send(client, NEW_DATA, f"dpo.dataset.{called}", called, {"path": str(whole)})
    typer.echo(f"{NEW_DATA} {called} {whole} (event {event})")
