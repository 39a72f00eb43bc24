"""`dpo cache`: list, check and clean up the cached reference log-probs of a workspace."""

from typing import Annotated

import typer

from flows.cli.options import WORKSPACE, DryRunOption, JsonOption, WorkspaceOption

app = typer.Typer(
    name="cache", help="List, check and clean up the cached reference log-probs.", no_args_is_help=True
)


@app.command("ls")
def ls(workspace: WorkspaceOption = WORKSPACE, as_json: JsonOption = False) -> None:
    """List the references whose log-probs are cached, last used first."""
    from flows.commands import cache

    cache.print_caches(workspace, as_json)


@app.command("verify")
def verify(
    workspace: WorkspaceOption = WORKSPACE,
    repair: Annotated[
        bool, typer.Option("--repair", help="Remove damaged shards; the next run computes them again.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Read every cached log-prob and compare it with its digest. Exit code 4: damage remains."""
    from flows.commands import cache

    cache.verify(workspace, repair, as_json)


@app.command("gc")
def gc(
    workspace: WorkspaceOption = WORKSPACE,
    unused_for: Annotated[
        float | None,
        typer.Option(metavar="DAYS", min=0.0, help="Also remove caches not used for so many days."),
    ] = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Remove unfinished files of killed runs, and merge small shards."""
    from flows.commands import cache

    cache.collect(workspace, unused_for, dry_run, as_json)
