"""`dpo runs`: what ran in a workspace, the newest first."""

import json
from pathlib import Path

import typer

from dpo_core.errors import RecipeError
from flows.wording import count
from tasks.runs import STATUSES, list_runs


def list_them(
    workspace: str, newest: int | None, statuses: list[str], recipe: str | None, as_json: bool
) -> None:
    """Print the runs.

    Args:
        newest: so many of those that are asked for; None: all.

    Raises:
        RecipeError: there is no such status.
    """
    for status in statuses:
        if status not in STATUSES:
            raise RecipeError(f"no run has the status {status}", f"Name one of {', '.join(STATUSES)}")
    asked = [
        run
        for run in list_runs(workspace)
        if (not statuses or run.status in statuses) and recipe in (None, run.recipe)
    ]
    if as_json:
        typer.echo(json.dumps([run.model_dump(mode="json") for run in asked[:newest]], indent=1))
        return
    if not asked:
        such = " such" if statuses or recipe else ""
        typer.echo(f"no{such} runs in {Path(workspace).absolute()}")
    for run in asked[:newest]:
        reason = f"  {run.error}" if run.error else ""
        typer.echo(f"{run.run_id:40} {run.status:8} {run.started_at:%Y-%m-%d %H:%M}{reason}")
    if newest is not None and len(asked) > newest:
        typer.echo(f"and {count(len(asked) - newest, 'older run')}: --all lists them")
