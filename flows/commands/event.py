"""The body of `dpo event new-data`: sends the event for a new data set."""

from pathlib import Path

import typer

from dpo_core.errors import DataError, RecipeError
from flows.process.prefect_server import server
from tasks.scheduling.events import deployments_waiting, make_event, send

NEW_DATA = "dpo.dataset.new"


def announce_data(path: str, name: str | None) -> None:
    """Send the event, if a deployment waits for it.

    Raises:
        DataError: the file or folder does not exist.
        RecipeError: no deployment waits for the event, or the server cannot be used.
    """
    data = Path(path).expanduser().absolute()
    if not data.exists():
        raise DataError(f"there is no data at {data}", "Name a file or a folder")
    name = name or data.name.partition(".")[0]
    resource = f"dpo.dataset.{name}"
    event = make_event(NEW_DATA, resource, name, {"path": str(data)})
    with server() as client:
        waiting = deployments_waiting(client, event)
        if not waiting:
            raise RecipeError(
                f"no deployment of this server waits for {NEW_DATA} about {resource}, so nothing would run",
                "Give one a trigger that expects it, as in deploy/prefect.yaml; then: dpo deploy",
            )
        send(client, event)
    typer.echo(f"{NEW_DATA} {name} {data} (event {event.id}), for {', '.join(waiting)}")
