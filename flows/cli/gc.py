"""`dpo gc`: make room in a workspace without taking from any run that is kept."""

from typing import Annotated

import typer

from flows.cli.format import count, size


def gc(
    keep: Annotated[int, typer.Option(metavar="N", min=0, help="Finished runs to keep, the newest.")] = 10,
    keep_run: Annotated[
        list[str] | None, typer.Option(metavar="RUN", help="Keep this run too; may be repeated.")
    ] = None,
    drop_run: Annotated[
        list[str] | None,
        typer.Option(metavar="RUN", help="Let this run go, unfinished or not; may be repeated."),
    ] = None,
    workspace: Annotated[str, typer.Option(help="Workspace folder.")] = "./runs",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")] = False,
) -> None:
    """Remove what no kept run needs: artifacts, working folders, Data Docs. Pages and records of runs stay.

    Always kept: unfinished runs, studies, models that an alias of the registry names (champion,
    previous-champion, challenger) and evaluated ones. For reference log-probs: dpo cache gc.
    """
    from tasks.housekeeping.garbage_collection import free

    done = free(workspace, keep=keep, keep_runs=keep_run or [], drop_runs=drop_run or [], dry_run=dry_run)
    if as_json:
        typer.echo(done.model_dump_json(indent=1))
        return
    would = "would " if dry_run else ""
    for name in done.leftovers:
        typer.echo(f"{would}remove  {name} (unfinished)")
    for artifact in done.unused:
        typer.echo(f"{would}remove  {artifact.kind} {artifact.sha256[:16]} (unused), {size(artifact.bytes)}")
    if done.held_back:
        typer.echo(
            f"no artifact is removed: {', '.join(done.held_back)}, unfinished and of an older version, "
            "do not say what they need; finish them, or let them go with --drop-run"
        )
    kept = f"{count(len(done.kept), 'run')} kept, {count(len(done.let_go), 'run')} let go"
    typer.echo(f"{kept}; {size(done.freed_bytes)} {'would be ' if dry_run else ''}freed")
