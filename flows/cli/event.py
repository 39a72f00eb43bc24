"""`dpo event`: tell the server what happened outside of it, so that triggers can act on it."""

from pathlib import Path
from typing import Annotated

import typer

from dpo_core.errors import DataError, RecipeError
from flows.process.prefect_server import server

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
    """Say that there is a new data set; deployments that wait for one run on it. Exit code 2: none waits."""
    from tasks.scheduling.events import deployments_waiting, send

    whole = Path(path).expanduser().absolute()
    if not whole.exists():
        raise DataError(f"there is no data at {whole}", "Name a file or a folder")
    called = name or whole.name.partition(".")[0]
    about = f"dpo.dataset.{called}"
    with server() as client:
        waiting = deployments_waiting(client, NEW_DATA, about)
        if not waiting:
            raise RecipeError(
                f"no deployment of this server waits for {NEW_DATA} about {about}, so nothing would run",
                "Give one a trigger that expects it, as deploy/prefect.yaml has; then: dpo deploy",
            )
        event = send(client, NEW_DATA, about, called, {"path": str(whole)})
    typer.echo(f"{NEW_DATA} {called} {whole} (event {event}), for {', '.join(waiting)}")
