"""`dpo ui`: open the MLflow UI on a workspace."""

from typing import Annotated

import typer

from flows.cli.options import WORKSPACE, WorkspaceOption


def ui(
    workspace: WorkspaceOption = WORKSPACE,
    port: Annotated[int, typer.Option(help="Port of the MLflow UI.", min=1, max=65535)] = 5000,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    browser: Annotated[bool, typer.Option(help="Open a browser window.")] = True,
) -> None:
    """Open the MLflow UI on the workspace, and print the address of Prefect's UI."""
    from flows.commands.ui import serve

    serve(workspace, host, port, browser)
