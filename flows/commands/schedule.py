"""The bodies of `dpo schedule`: list the schedules on the server, pause and resume them."""

import json
from typing import Any

import typer

from dpo_core.errors import RecipeError
from flows.commands.format import readable_time
from flows.process.prefect_server import server
from tasks.scheduling.deployments import deployments_on_server, next_times


def print_schedules(as_json: bool) -> None:
    with server() as client:
        rows = [_row(deployment, schedule) for deployment, schedule in _schedules(client)]
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    if not rows:
        typer.echo("no schedules on the server; see dpo deploy")
    for row in rows:
        state = "active" if row["active"] else "paused"
        times = ", ".join(readable_time(time) for time in row["next"])
        typer.echo(
            f"{row['name']:32} {state:7} {row['rule']} {row['timezone']}{f'  {times}' if times else ''}"
        )


def set_active(name: str, *, active: bool) -> None:
    """Pause or resume a schedule.

    Raises:
        RecipeError: no schedule or several have the name, or the server cannot be used.
    """
    with server() as client:
        schedules = _schedules(client)
        matching = [pair for pair in schedules if name in (_name(*pair), pair[1].slug)]
        if len(matching) != 1:
            known = ", ".join(_name(*pair) for pair in (matching or schedules)) or "none"
            problem = (
                f"{len(matching)} schedules are named {name}" if matching else f"no schedule is named {name}"
            )
            raise RecipeError(problem, f"Name one of: {known}")
        deployment, schedule = matching[0]
        client.update_deployment_schedule(deployment.id, schedule.id, active=active)
    typer.echo(f"{_name(deployment, schedule)} {'active' if active else 'paused'}")


def _schedules(client: Any) -> list[tuple[Any, Any]]:
    """Each schedule with its deployment."""
    deployments = sorted(deployments_on_server(client, "dpo"), key=lambda deployment: deployment.name)
    return [(deployment, schedule) for deployment in deployments for schedule in deployment.schedules]


def _name(deployment: Any, schedule: Any) -> str:
    return f"{deployment.name}/{schedule.slug or schedule.id}"


def _row(deployment: Any, schedule: Any) -> dict[str, Any]:
    fires = schedule.active and not deployment.paused
    rule = schedule.schedule
    return {
        "name": _name(deployment, schedule),
        "active": fires,
        "rule": str(getattr(rule, "cron", None) or getattr(rule, "rrule", None) or rule.interval),
        "timezone": rule.timezone,
        "next": [time.isoformat() for time in next_times(rule)] if fires else [],
    }
