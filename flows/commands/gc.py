"""The body of `dpo gc`: collects the garbage of a workspace and prints what is kept and removed, and why."""

import typer

from flows.commands.format import count, size
from tasks.housekeeping.garbage_collection import Freed


def print_freed(done: Freed, *, dry_run: bool, as_json: bool) -> None:
    """Print what was kept and removed, or what would be."""
    if as_json:
        typer.echo(done.model_dump_json(indent=1))
        return
    would = "would " if dry_run else ""
    for item in done.kept:
        typer.echo(f"{would}keep    {item.what} ({item.why}), {size(item.bytes)}")
    for gone in done.removed:
        typer.echo(f"{would}remove  {gone.what} ({gone.why}), {size(gone.bytes)}")
    for key, shards in done.merged.items():
        typer.echo(f"{would}merge   {count(shards, 'shard')} of reference_cache/{key[:16]}")
    runs = f"{count(sum(item.what.startswith('run ') for item in done.kept), 'run')} kept, "
    runs += f"{count(len(done.dropped_runs), 'run')} dropped"
    typer.echo(f"{runs}; {size(done.freed_bytes)} {'would be ' if dry_run else ''}freed")
