"""`dpo schedule`: which schedules the server has, when they fire next, and holding one for a while."""

import json
from typing import Annotated, Any

import typer

from dpo_core.errors import RecipeError
from flows.cli.deploy import readable
from flows.cli.options import JsonOption
from flows.process.prefect_server import server

app = typer.Typer(help="Look at the schedules on the server, pause and resume them.", no_args_is_help=True)

NameArgument = Annotated[
    str, typer.Argument(metavar="SCHEDULE", help="Its slug, or deployment/slug where the slug is not unique.")
]


@app.command("list")
def list_schedules(as_json: JsonOption = False) -> None:
    """List the schedules on the server with their next five times."""
    with server() as client:
        rows = [_row(deployment, schedule) for deployment, schedule in _found(client)]
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    if not rows:
        typer.echo("no schedules on the server; see dpo deploy")
    for row in rows:
        state = "active" if row["active"] else "paused"
        times = ", ".join(readable(time) for time in row["next"])
        typer.echo(
            f"{row['name']:32} {state:7} {row['rule']} {row['timezone']}{f'  {times}' if times else ''}"
        )


@app.command("pause")
def pause(name: NameArgument) -> None:
    """Let a schedule not fire until it is resumed. The next `dpo deploy` sets it to what the file says."""
    _set(name, active=False)


@app.command("resume")
def resume(name: NameArgument) -> None:
    """Let a paused schedule fire again."""
    _set(name, active=True)


def _found(client: Any) -> list[tuple[Any, Any]]:
    from tasks.scheduling.deployments import unmanaged_deployments

    deployments = sorted(unmanaged_deployments(client, "dpo", set()), key=lambda one: one.name)
    return [(deployment, schedule) for deployment in deployments for schedule in deployment.schedules]


def _name(deployment: Any, schedule: Any) -> str:
    return f"{deployment.name}/{schedule.slug or schedule.id}"


def _row(deployment: Any, schedule: Any) -> dict[str, Any]:
    from tasks.scheduling.schedules import next_times

    fires = schedule.active and not deployment.paused
    rule = schedule.schedule
    return {
        "name": _name(deployment, schedule),
        "active": fires,
        "rule": str(getattr(rule, "cron", None) or getattr(rule, "rrule", None) or rule.interval),
        "timezone": rule.timezone,
        "next": [time.isoformat() for time in next_times(rule)] if fires else [],
    }


def _set(name: str, *, active: bool) -> None:
    with server() as client:
        found = _found(client)
        chosen = [pair for pair in found if name in (_name(*pair), pair[1].slug)]
        if len(chosen) != 1:
            known = ", ".join(_name(*pair) for pair in (chosen or found)) or "none"
            problem = (
                f"{len(chosen)} schedules are named {name}" if chosen else f"no schedule is named {name}"
            )
            raise RecipeError(problem, f"Name one of: {known}")
        deployment, schedule = chosen[0]
        client.update_deployment_schedule(deployment.id, schedule.id, active=active)
    typer.echo(f"{_name(deployment, schedule)} {'active' if active else 'paused'}")
