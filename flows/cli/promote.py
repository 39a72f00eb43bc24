"""`dpo promote` and `dpo rollback`: make a run's model the champion, or restore the previous champion."""

from typing import Annotated

import typer

from flows.cli.options import WORKSPACE, JsonOption, WorkspaceOption

ReasonOption = Annotated[str, typer.Option(metavar="TEXT", help="Reason, recorded with the change.")]


def promote(
    run_id: Annotated[
        str | None, typer.Argument(metavar="RUN", help="A finished run; see `dpo runs`.")
    ] = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Promote although rules fail; they are recorded. Needs a --reason."),
    ] = False,
    reason: ReasonOption = "",
    check: Annotated[
        bool, typer.Option("--check", help="Print the champions, and finish an interrupted promotion.")
    ] = False,
    workspace: WorkspaceOption = WORKSPACE,
    as_json: JsonOption = False,
) -> None:
    """Make a run's model the champion, if every rule of its decision holds. Exit code 5: refused.

    With --check, exit code 4: the weights of a champion are missing or damaged.
    """
    from dpo_core.errors import RecipeError

    if check == (run_id is not None):
        raise RecipeError("dpo promote takes a run, or --check alone", "List the runs with: dpo runs")
    if force and not reason:
        raise RecipeError("--force needs a reason, which is recorded", "Add --reason TEXT")
    from flows.commands import promote

    if run_id is None:
        promote.check(workspace, as_json)
    else:
        promote.promote(workspace, run_id, reason, force=force, as_json=as_json)


def rollback(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="The registered model, if there are several.")
    ] = None,
    reason: ReasonOption = "",
    workspace: WorkspaceOption = WORKSPACE,
    as_json: JsonOption = False,
) -> None:
    """Make the previous champion the champion again. Exit code 5: there is none, or its files are damaged."""
    from flows.commands import promote

    promote.rollback(workspace, name, reason, as_json)
