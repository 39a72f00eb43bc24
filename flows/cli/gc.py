"""`dpo gc`: remove what no kept run of a workspace needs."""

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
    workspace: WorkspaceOption = WORKSPACE,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Remove artifacts, working folders and Data Docs that no kept run needs. Pages and records remain.

    Always kept: unfinished runs, studies, models with an alias in the registry (champion, previous-champion,
    challenger) and evaluated models. For reference log-probs: dpo cache gc.
    """
    from flows.commands.gc import free_space

    free_space(workspace, keep, keep_run or [], drop_run or [], dry_run=dry_run, as_json=as_json)
