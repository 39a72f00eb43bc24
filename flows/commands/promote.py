"""The bodies of `dpo promote` and `dpo rollback`: change the champion and print the result."""

import json

import typer

from dpo_core.errors import PromotionRefused, RecipeError, StageFailed
from flows.process.prefect_server import server, server_address
from tasks.promotion import promote as promotion
from tasks.promotion.finished_run import finished_report
from tasks.promotion.ledger import sentence
from tasks.promotion.promote import ModelVersions
from tasks.scheduling.events import promotion_refused
from tasks.store.files import open_workspace


def check(workspace: str, as_json: bool) -> None:
    """Finish interrupted promotions and print the champions.

    Raises:
        StageFailed: the weights of a champion are missing or damaged.
    """
    standings = promotion.check(workspace)
    _show_all(standings, as_json)
    if lost := [f"{s.name} version {s.champion}" for s in standings if not s.sound]:
        raise StageFailed(f"champions without their weights: {', '.join(lost)}", "Run: dpo rollback")


def promote(workspace: str, run_id: str, reason: str, *, force: bool, as_json: bool) -> None:
    """Promote a run's model, or send an alert that it was refused.

    Raises:
        PromotionRefused: a rule of the decision does not hold.
    """
    try:
        standing = promotion.promote(workspace, run_id, force=force, reason=reason)
    except PromotionRefused as error:
        _send_refusal(workspace, run_id, error.problem)
        raise
    _show(standing, as_json)


def rollback(workspace: str, name: str | None, reason: str, as_json: bool) -> None:
    """Restore the previous champion."""
    _show(promotion.rollback(workspace, name, reason=reason), as_json)


def _send_refusal(workspace: str, run_id: str, message: str) -> None:
    """Send the event of the alert if a server is configured; one that does not answer is ignored."""
    if server_address() is None:
        return
    _, model = finished_report(open_workspace(workspace), run_id)
    try:
        with server() as client:
            promotion_refused(client, model.name, str(model.version), message)
    except RecipeError as error:
        typer.echo(f"no alert about the refusal was sent: {error.problem}", err=True)


def _show(standing: ModelVersions, as_json: bool) -> None:
    if as_json:
        typer.echo(standing.model_dump_json(indent=1))
        return
    for note in standing.notes:
        typer.echo(note)
    if standing.changed and standing.change:
        typer.echo(sentence(standing.change))
        for overridden in standing.change.overridden:
            typer.echo(f"overridden  {overridden}")
    else:
        typer.echo(f"{standing.name} version {standing.champion} is the champion already; nothing changed")
    typer.echo(_aliases(standing))


def _show_all(standings: list[ModelVersions], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps([standing.model_dump(mode="json") for standing in standings], indent=1))
        return
    if not standings:
        typer.echo("no registered models")
    for standing in standings:
        typer.echo(f"{standing.name}: {_aliases(standing)}")
        for note in standing.notes:
            typer.echo(f"  {note}")


def _aliases(standing: ModelVersions) -> str:
    versions = {
        "champion": standing.champion,
        "previous-champion": standing.previous,
        "challenger": standing.challenger,
    }
    return ", ".join(f"{alias} {'none' if number is None else number}" for alias, number in versions.items())
