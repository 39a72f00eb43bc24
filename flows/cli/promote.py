"""`dpo promote` and `dpo rollback`: who is champion, and back again. Exit code 5: refused."""

from typing import Annotated, Any

import typer

from flows.cli.options import JsonOption

WorkspaceOption = Annotated[str, typer.Option(help="Workspace folder.")]
ReasonOption = Annotated[str, typer.Option(metavar="TEXT", help="Why; kept with the change.")]


def promote(
    run_id: Annotated[
        str | None, typer.Argument(metavar="RUN", help="A finished run; see `dpo runs`.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Promote against the rules; what was overridden is kept.")
    ] = False,
    reason: ReasonOption = "",
    check: Annotated[
        bool, typer.Option("--check", help="Say who is champion, and finish a promotion that was cut off.")
    ] = False,
    workspace: WorkspaceOption = "./runs",
    as_json: JsonOption = False,
) -> None:
    """Make a run's model the champion, if every rule of its decision holds. Exit code 5: refused.

    With --check, exit code 4: a champion's weights are gone or damaged.
    """
    from dpo_core.errors import PromotionRefused, RecipeError, StageFailed
    from tasks.promotion import promote as promotion

    if check == (run_id is not None):
        raise RecipeError("dpo promote takes a run, or --check alone", "List the runs with: dpo runs")
    if run_id is None:
        standings = promotion.check(workspace)
        _show_all(standings, as_json)
        if lost := [f"{s.name} version {s.champion}" for s in standings if not s.sound]:
            raise StageFailed(
                f"champions without their weights: {', '.join(lost)}", "Go back with: dpo rollback"
            )
        return
    try:
        standing = promotion.promote(workspace, run_id, force=force, reason=reason)
    except PromotionRefused as error:
        _tell(workspace, run_id, error.problem)
        raise
    _show(standing, as_json)


def _tell(workspace: str, run_id: str, message: str) -> None:
    """Send the event that the alert waits for, where a server is named; one that is away changes nothing."""
    from dpo_core.errors import RecipeError
    from flows.process.prefect_server import server, server_address
    from tasks.promotion.finished_run import finished_report
    from tasks.scheduling.events import promotion_refused
    from tasks.store.files import open_workspace

    if server_address() is None:
        return
    _, model = finished_report(open_workspace(workspace), run_id)
    try:
        with server() as client:
            promotion_refused(client, model.name, str(model.version), message)
    except RecipeError as error:
        typer.echo(f"nobody was told of the refusal: {error.problem}", err=True)


def rollback(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="The registered model, where there are several.")
    ] = None,
    reason: ReasonOption = "",
    workspace: WorkspaceOption = "./runs",
    as_json: JsonOption = False,
) -> None:
    """Make the previous champion the champion again. Exit code 5: there is none, or its files are damaged."""
    from tasks.promotion import promote as promotion

    _show(promotion.rollback(workspace, name, reason=reason), as_json)


def _show(standing: Any, as_json: bool) -> None:
    from tasks.promotion.ledger import sentence

    if as_json:
        typer.echo(standing.model_dump_json(indent=1))
        return
    for note in standing.notes:
        typer.echo(note)
    if standing.changed:
        typer.echo(sentence(standing.change))
        for overridden in standing.change.overridden:
            typer.echo(f"overridden  {overridden}")
    else:
        typer.echo(f"{standing.name} version {standing.champion} is the champion already; nothing changed")
    typer.echo(_aliases(standing))


def _show_all(standings: list[Any], as_json: bool) -> None:
    import json

    if as_json:
        typer.echo(json.dumps([standing.model_dump(mode="json") for standing in standings], indent=1))
        return
    if not standings:
        typer.echo("no registered models")
    for standing in standings:
        typer.echo(f"{standing.name}: {_aliases(standing)}")
        for note in standing.notes:
            typer.echo(f"  {note}")


def _aliases(standing: Any) -> str:
    held = {
        "champion": standing.champion,
        "previous-champion": standing.previous,
        "challenger": standing.challenger,
    }
    return ", ".join(f"{alias} {'none' if number is None else number}" for alias, number in held.items())
