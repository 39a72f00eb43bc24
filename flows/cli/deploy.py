"""`dpo deploy`, `dpo schedule` and `dpo event`: deployments, schedules and events on the Prefect server."""

from typing import Annotated

import typer

from flows.cli.options import DryRunOption, FileOption, JsonOption

NotifyOption = Annotated[
    str | None,
    typer.Option(
        envvar="DPO_NOTIFY_URL",
        show_default=False,
        help="Webhook or Apprise address for alerts about failed, crashed, late and refused runs. Set it in "
        "the environment, because other users can read options. Without it, alerts do not change; `none` "
        "removes them.",
    ),
]
ScheduleArgument = Annotated[
    str, typer.Argument(metavar="SCHEDULE", help="Its slug, or deployment/slug if the slug is not unique.")
]

schedule_app = typer.Typer(
    name="schedule", help="List, pause and resume the schedules on the server.", no_args_is_help=True
)
event_app = typer.Typer(name="event", help="Send events to the server.", no_args_is_help=True)


def deploy(
    file: FileOption = None,
    dry_run: DryRunOption = False,
    prune: Annotated[
        bool, typer.Option("--prune", help="Delete deployments that are not in the file.")
    ] = False,
    notify: NotifyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check the deployment file, show the changes and the next times of its schedules, and apply it."""
    from flows.commands.deploy import deploy_file

    deploy_file(file, notify, dry_run=dry_run, prune=prune, as_json=as_json)


@schedule_app.command("list")
def list_schedules(as_json: JsonOption = False) -> None:
    """List the schedules on the server with their next five times."""
    from flows.commands.schedule import print_schedules

    print_schedules(as_json)


@schedule_app.command("pause")
def pause(name: ScheduleArgument) -> None:
    """Pause a schedule until it is resumed. The next `dpo deploy` sets it to the state in the file."""
    from flows.commands.schedule import set_active

    set_active(name, active=False)


@schedule_app.command("resume")
def resume(name: ScheduleArgument) -> None:
    """Resume a paused schedule."""
    from flows.commands.schedule import set_active

    set_active(name, active=True)


@event_app.callback()
def _group() -> None:
    """Makes `new-data` a subcommand although it is the only one."""


@event_app.command("new-data")
def new_data(
    path: Annotated[str, typer.Argument(help="A data file or a folder, at its path on the workers.")],
    name: Annotated[
        str | None, typer.Option(help="Name of the data set; by default the file's name.")
    ] = None,
) -> None:
    """Announce a new data set; the deployments that wait for one run on it. Exit code 2: none waits."""
    from flows.commands.event import announce_data

    announce_data(path, name)
