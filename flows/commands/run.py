"""The body of `dpo run`: runs the flow of a recipe, and prints how to resume it if a stage fails."""

from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import typer
from prefect.exceptions import PrefectHTTPStatusError

from deploy.launchers import Cluster
from dpo_core.errors import DpoError, NeedsNewSettings
from flows.alignment import Report, alignment
from flows.commands.results import read_report
from flows.process.prefect_server import unreachable_error
from flows.process.temporary_server import wait_for_temporary_server
from tasks.recipe.recipe import Recipe
from tasks.runs.record import own_run
from tasks.signals import stoppable


def run_flow(recipe: Recipe, resume: str | None, cluster: Cluster | None) -> Report:
    """Run the recipe's flow in this process and return its report."""
    try:
        with stoppable() as stop:
            stop.before_time_is_up = lambda: _print_resume_line(recipe.workspace, "")
            wait_for_temporary_server()
            return alignment(recipe, resume, cluster)
    except (RuntimeError, httpx.TransportError, PrefectHTTPStatusError) as error:
        record = own_run(recipe.workspace)
        unreachable = unreachable_error(error, begun=record is not None)
        if unreachable is error or record is None or record.status != "done":
            raise unreachable from error
        # All stages are done; only the report of the run's end did not reach Prefect.
        typer.echo(f"warning: the run is done, but Prefect does not know: {unreachable}", err=True)
        return read_report(recipe.workspace, record.run_id)


@contextmanager
def resume_line_on_failure(workspace: str, line: str) -> Iterator[None]:
    """Print the command that resumes the run if a stage fails in the body.

    Args:
        line: that command, for a run without a record.
    """
    try:
        yield
    except BaseException as error:
        code = error.exit_code if isinstance(error, DpoError) else 4
        if code == 4 and not isinstance(error, NeedsNewSettings):
            _print_resume_line(workspace, line)
        raise


def _print_resume_line(workspace: str, line: str) -> None:
    record = own_run(workspace)
    if text := record.resume_line if record else line:
        typer.echo(f"to resume: {text}", err=True)
