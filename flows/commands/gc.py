"""The body of `dpo gc`: collects the garbage of a workspace and prints what was removed."""

import typer

from flows.commands.format import count, size
from tasks.housekeeping.garbage_collection import free


def free_space(
    workspace: str, keep: int, keep_runs: list[str], drop_runs: list[str], *, dry_run: bool, as_json: bool
) -> None:
    """Remove what no kept run needs.

    Raises:
        RecipeError: a run does not exist, or is to be both kept and dropped.
    """
    done = free(workspace, keep=keep, keep_runs=keep_runs, drop_runs=drop_runs, dry_run=dry_run)
    if as_json:
        typer.echo(done.model_dump_json(indent=1))
        return
    would = "would " if dry_run else ""
    for name in done.leftovers:
        typer.echo(f"{would}remove  {name} (left over)")
    for artifact in done.unused:
        typer.echo(f"{would}remove  {artifact.kind} {artifact.sha256[:16]} (unused), {size(artifact.bytes)}")
    if done.held_back:
        typer.echo(
            f"no artifact is removed, because the unfinished runs {', '.join(done.held_back)} of an older "
            "version do not list what they need; finish them, or drop them with --drop-run"
        )
    runs = f"{count(len(done.kept), 'run')} kept, {count(len(done.let_go), 'run')} dropped"
    typer.echo(f"{runs}; {size(done.freed_bytes)} {'would be ' if dry_run else ''}freed")
