"""`dpo cache`: look at the reference log-probs that a workspace knows, check them, and make room."""

from typing import Annotated, Any

import typer

from flows.cli.format import count, size
from flows.cli.options import JsonOption

app = typer.Typer(help="Look after the cached reference log-probs.", no_args_is_help=True)

WorkspaceOption = Annotated[str, typer.Option(help="Workspace folder.")]
RUNS = "./runs"


@app.command("ls")
def ls(workspace: WorkspaceOption = RUNS, as_json: JsonOption = False) -> None:
    """List the references whose log-probs are cached, last used first."""
    import json

    from tasks.housekeeping.reference_caches import list_caches

    found = list_caches(workspace)
    if as_json:
        typer.echo(json.dumps([summary.model_dump(mode="json") for summary in found], indent=1))
        return
    if not found:
        typer.echo(f"no reference log-probs in {workspace}")
    for summary in found:
        typer.echo(
            f"{summary.key[:16]}  {summary.entries:,} sequences, {summary.tokens:,} tokens, "
            f"{size(summary.bytes)}, {count(summary.shards, 'shard')}, "
            f"used {summary.last_used.astimezone():%Y-%m-%d %H:%M}"
        )
        typer.echo(f"  {_reference(summary.reference)}")
        if summary.reference and not summary.current:
            typer.echo(
                "  of another version, not read by this one; remove with: dpo cache gc --unused-for DAYS"
            )
        if summary.damaged:
            typer.echo(f"  {count(summary.damaged, 'shard')} damaged; run: dpo cache verify --repair")


@app.command("verify")
def verify(
    workspace: WorkspaceOption = RUNS,
    repair: Annotated[
        bool, typer.Option("--repair", help="Remove damaged shards; the next run computes them again.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Read every cached log-prob and compare it with its digest. Exit code 4 when damage stays."""
    from dpo_core.errors import StageFailed
    from tasks.housekeeping.reference_caches import verify_caches

    told = verify_caches(workspace, repair=repair)
    if as_json:
        typer.echo(told.model_dump_json(indent=1))
    else:
        for damage in told.damaged:
            typer.echo(f"{'removed' if damage.removed else 'damaged'}  {damage.problem}")
        read = f"{count(told.shards, 'shard')} read, {told.entries:,} whole entries"
        typer.echo(read if told.shards else f"no reference log-probs in {workspace}")
    if told.damaged and not repair:
        raise StageFailed(
            f"{len(told.damaged)} of {count(told.shards, 'shard')} of reference log-probs are damaged",
            "Remove them with: dpo cache verify --repair; the next run computes them again",
        )


@app.command("gc")
def gc(
    workspace: WorkspaceOption = RUNS,
    unused_for: Annotated[
        float | None,
        typer.Option(metavar="DAYS", min=0.0, help="Also remove caches not used for so many days."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove what killed runs left unfinished, and make one shard of many."""
    from tasks.housekeeping.reference_caches import collect_garbage

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
        return "reference not written down (by an older version)"
    return (
        f"{facts.model or 'unnamed reference'}, weights {facts.weights_sha256[:16]}, {facts.precision}, "
        f"{facts.attention} attention, definition {facts.definition_version}"
    )
