"""The bodies of `dpo cache`: print, verify and clean up the cached reference log-probs."""

import json
from typing import Any

import typer

from dpo_core.errors import StageFailed
from flows.commands.format import count, size
from tasks.housekeeping.reference_caches import collect_garbage, list_caches, verify_caches


def print_caches(workspace: str, as_json: bool) -> None:
    caches = list_caches(workspace)
    if as_json:
        typer.echo(json.dumps([cache.model_dump(mode="json") for cache in caches], indent=1))
        return
    if not caches:
        typer.echo(f"no reference log-probs in {workspace}")
    for cache in caches:
        typer.echo(
            f"{cache.key[:16]}  {cache.entries:,} sequences, {cache.tokens:,} tokens, "
            f"{size(cache.bytes)}, {count(cache.shards, 'shard')}, "
            f"used {cache.last_used.astimezone():%Y-%m-%d %H:%M}"
        )
        typer.echo(f"  {_reference(cache.reference)}")
        if cache.reference and not cache.current:
            typer.echo(
                "  of another version, not read by this one; remove with: dpo cache gc --unused-for DAYS"
            )
        if cache.damaged:
            typer.echo(f"  {count(cache.damaged, 'shard')} damaged; run: dpo cache verify --repair")


def verify(workspace: str, repair: bool, as_json: bool) -> None:
    """Compare every cached log-prob with its digest.

    Raises:
        StageFailed: shards are damaged and were not removed.
    """
    result = verify_caches(workspace, repair=repair)
    if as_json:
        typer.echo(result.model_dump_json(indent=1))
    else:
        for damage in result.damaged:
            typer.echo(f"{'removed' if damage.removed else 'damaged'}  {damage.problem}")
        read = f"{count(result.shards, 'shard')} read, {result.entries:,} complete entries"
        typer.echo(read if result.shards else f"no reference log-probs in {workspace}")
    if result.damaged and not repair:
        raise StageFailed(
            f"{len(result.damaged)} of {count(result.shards, 'shard')} of reference log-probs are damaged",
            "Remove them with: dpo cache verify --repair; the next run computes them again",
        )


def collect(workspace: str, unused_for: float | None, dry_run: bool, as_json: bool) -> None:
    """Remove unfinished and unused files, and merge small shards."""
    done = collect_garbage(workspace, unused_for=unused_for, dry_run=dry_run)
    if as_json:
        typer.echo(done.model_dump_json(indent=1))
        return
    would = "would " if dry_run else ""
    for name in done.leftovers:
        typer.echo(f"{would}remove  {name} (unfinished)")
    for key in done.unused:
        typer.echo(f"{would}remove  {key[:16]} (unused)")
    for key, shards in done.merged.items():
        typer.echo(f"{would}merge   {key[:16]} ({count(shards, 'shard')})")
    typer.echo(f"{size(done.freed_bytes)} {'would be ' if dry_run else ''}freed")


def _reference(facts: Any) -> str:
    if facts is None:
        return "reference not recorded (written by an older version)"
    return (
        f"{facts.model or 'unnamed reference'}, weights {facts.weights_sha256[:16]}, {facts.precision}, "
        f"{facts.attention} attention, definition {facts.definition_version}"
    )
