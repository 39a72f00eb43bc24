"""`dpo run` and `dpo show`: run a recipe in this process, and print the results of a finished run."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.options import (
    WORKSPACE,
    JsonOption,
    RecipeArgument,
    ResumeOption,
    SetOption,
    WorkspaceOption,
)

if TYPE_CHECKING:
    from deploy.launchers import Cluster


def run(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    resume: ResumeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run a recipe from the data gate to the run page. Finished stages are reused."""
    run_recipe(recipe, overrides or [], resume, as_json=as_json)


def run_recipe(
    recipe: str,
    overrides: list[str],
    resume: str | None,
    cluster: "Cluster | None" = None,
    as_json: bool = False,
) -> None:
    """Run a recipe; its jobs run on the cluster, or without one on this machine."""
    from tasks.recipe.read import load_recipe

    resolved = load_recipe(recipe, overrides)
    workspace = Path(resolved.workspace).absolute()
    typer.echo(f"recipe {resolved.name}, workspace {workspace}; starting takes about 10 s", err=as_json)
    from flows.process.temporary_server import start_temporary_server

    start_temporary_server()  # takes as long as loading the rest
    from tasks.preflight import check_before_run

    check_before_run(resolved, resume, cluster)  # before the run has a record; the flow checks again
    from flows.commands.results import print_report
    from flows.commands.run import resume_line_on_failure, run_flow
    from tasks.provenance import command_line
    from tasks.runs.record import resume_line

    with resume_line_on_failure(resolved.workspace, resume_line(command_line())):
        report = run_flow(resolved, resume, cluster)
    print_report(report, resolved.workspace, as_json)


def show(
    run_id: Annotated[str, typer.Argument(metavar="RUN", help="Name of a run; see `dpo runs`.")],
    workspace: WorkspaceOption = WORKSPACE,
    as_json: JsonOption = False,
) -> None:
    """Print the tables of a finished run."""
    from flows.commands.results import print_report, read_report

    print_report(read_report(workspace, run_id), workspace, as_json)
