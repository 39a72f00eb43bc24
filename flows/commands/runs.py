"""The body of `dpo runs`: prints the runs of a workspace with their status and result, newest first."""

import json
import shlex
from itertools import pairwise
from pathlib import Path

import typer

from dpo_core.errors import RecipeError
from dpo_core.statistics.format import bounded
from flows.commands.format import count
from tasks.runs.record import STATUSES, list_runs
from tasks.store.files import run_folder


def _result(workspace: str, run_id: str) -> str:
    """Decision, gain, registered version and method of a finished run, as far as its report has them."""
    try:
        facts = json.loads((run_folder(workspace, run_id) / "report.json").read_bytes())
        if "study" in facts:
            return ""
        candidate = facts["candidate"]
        decision, rows = facts.get("decision"), (facts.get("evaluation") or {}).get("policies") or []
        gain = next((row["gain"] for row in rows if row["name"] == candidate and row.get("gain")), None)
        about, model = facts["policies"].get(candidate) or {}, facts.get("model")
        parts = [
            ("promote" if decision["promote"] else "do not promote") if decision else "",
            f"gain {bounded(gain['value'], gain['low'], gain['high'], 'gap')}" if gain else "",
            f"{model['name']} version {model['version']}" if model else "",
            f"trained with {about.get('objective') or about.get('method')}" if about else "",
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # gone, damaged or of another version
        return ""
    return ", ".join(part for part in parts if part)


def _overrides(command: str) -> str:
    """The `--set` options of a command: `--set seed=1 --set data.limit=null`."""
    words = shlex.split(command)
    sets = [after for word, after in pairwise(words) if word == "--set"]
    sets += [word.removeprefix("--set=") for word in words if word.startswith("--set=")]
    return " ".join(f"--set {shlex.quote(one)}" for one in sets)


def print_runs(
    workspace: str, newest: int | None, statuses: list[str], recipe: str | None, as_json: bool
) -> None:
    """Print the runs with one of these statuses and of this recipe, if given.

    Args:
        newest: maximum number of runs; None: all.

    Raises:
        RecipeError: a status does not exist.
    """
    for status in statuses:
        if status not in STATUSES:
            raise RecipeError(f"no run has the status {status}", f"Name one of {', '.join(STATUSES)}")
    runs = [
        run
        for run in list_runs(workspace)
        if (not statuses or run.status in statuses) and recipe in (None, run.recipe)
    ]
    if as_json:
        typer.echo(json.dumps([run.model_dump(mode="json") for run in runs[:newest]], indent=1))
        return
    if not runs:
        matching = "matching " if statuses or recipe else ""
        typer.echo(f"no {matching}runs in {Path(workspace).absolute()}")
    for run in runs[:newest]:
        result = run.error or (_result(workspace, run.run_id) if run.status == "done" else "")
        line = f"{run.run_id:40} {run.status:8} {run.started_at:%Y-%m-%d %H:%M}"
        typer.echo("  ".join([line, *filter(None, [result, _overrides(run.command)])]))
    if newest is not None and len(runs) > newest:
        typer.echo(f"and {count(len(runs) - newest, 'older run')}: --all lists them")
