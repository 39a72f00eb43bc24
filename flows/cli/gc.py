"""`dpo gc`: remove what nothing needs from a workspace."""

from typing import Annotated

import typer

from flows.cli.options import WORKSPACE, DryRunOption, JsonOption, WorkspaceOption


def gc(
    keep: Annotated[int, typer.Option(metavar="N", min=0, help="Keep the newest N finished runs.")] = 10,
    keep_run: Annotated[
        list[str] | None, typer.Option(metavar="RUN", help="Keep this run too; may be repeated.")
    ] = None,
    drop_run: Annotated[
        list[str] | None,
        typer.Option(metavar="RUN", help="Drop this run, finished or not; may be repeated."),
    ] = None,
    unused_for: Annotated[
        float,
        typer.Option(metavar="DAYS", min=0.0, help="Empty the caches of what was not used for so many days."),
    ] = 90.0,
    workspace: WorkspaceOption = WORKSPACE,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Remove artifacts, working folders, Data Docs and cached values that nothing needs.

    Always kept: pages and records, unfinished runs, studies, models with an alias in the registry (champion,
    previous-champion, challenger) and evaluated models. The caches hold reference log-probs, suite results,
    judges' replies and converted models.
    """
    from flows.commands.gc import print_freed
    from tasks.housekeeping.garbage_collection import free

    done = free(
        workspace,
        keep=keep,
        keep_runs=keep_run or [],
        drop_runs=drop_run or [],
        unused_days=unused_for,
        dry_run=dry_run,
    )
    print_freed(done, dry_run=dry_run, as_json=as_json)
