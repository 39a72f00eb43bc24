"""`dpo runs`: list the runs of a workspace."""

from typing import Annotated

import typer

from flows.cli.options import WORKSPACE, JsonOption, WorkspaceOption

_DEFAULT_LIMIT = 20


def runs(
    newest: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help=f"List so many; by default {_DEFAULT_LIMIT}, in JSON all."),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="List all of them.")] = False,
    status: Annotated[
        list[str] | None,
        typer.Option(help="Only running, done, failed, refused or stopped ones; may be repeated."),
    ] = None,
    recipe: Annotated[str | None, typer.Option(metavar="NAME", help="Only those of a recipe.")] = None,
    workspace: WorkspaceOption = WORKSPACE,
    as_json: JsonOption = False,
) -> None:
    """List the runs of a workspace, newest first."""
    from flows.commands.runs import print_runs

    if every and newest is not None:
        raise typer.BadParameter("--all and --newest exclude each other: use one of them")
    limit = newest if newest is not None or every or as_json else _DEFAULT_LIMIT
    print_runs(workspace, limit, status or [], recipe, as_json)
