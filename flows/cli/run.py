"""`dpo run` and `dpo show`: a whole run in this process, and the table of a finished one."""

import json
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from flows.cli.options import JsonOption, RecipeArgument, SetOption


def run(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    resume: Annotated[
        str | None,
        typer.Option(metavar="[RUN]", help="Go on with a run; without a name, the newest unfinished one."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Run a recipe from the data gate to the run page. Finished stages are reused."""
    run_recipe(recipe, overrides or [], resume, as_json=as_json)


def run_recipe(
    recipe: str, overrides: list[str], resume: str | None, cluster: Any = None, as_json: bool = False
) -> None:
    """Run a recipe; its training jobs run on the cluster, without one on this machine."""
    from tasks.recipe.read import load_recipe

    resolved = load_recipe(recipe, overrides)
    _say(as_json, f"recipe {resolved.name}, workspace {Path(resolved.workspace).absolute()}")
    from tasks.preflight import check_before_run

    # Before the flow, which checks again: Prefect's server takes seconds to start.
    check_before_run(resolved, resume, cluster)
    with _resumable(resolved.workspace, recipe, overrides):
        report = _through_prefect(resolved, resume, cluster)
    if as_json:
        typer.echo(report.model_dump_json())
    else:
        _show(report, resolved.workspace)


def _through_prefect(recipe: Any, resume: str | None, cluster: Any) -> Any:
    """The report of the recipe's flow, which this process runs."""
    import httpx
    from prefect.exceptions import PrefectHTTPStatusError

    from flows.alignment import alignment
    from flows.process.guard import guarded
    from flows.process.orphans import end_orphans
    from flows.process.prefect_server import prefect_away
    from flows.process.temporary_server import start_temporary_server
    from tasks.runs.record import own_run
    from tasks.signals import stoppable

    end_orphans()
    try:
        with guarded(recipe.workspace, recipe.tracking), stoppable():
            start_temporary_server()
            return alignment(recipe, resume, cluster)
    except (RuntimeError, httpx.TransportError, PrefectHTTPStatusError) as error:
        record = own_run(recipe.workspace)
        away = prefect_away(error, begun=record is not None)
        if away is error or record is None or record.status != "done":
            raise away from error
        # It wanted to tell Prefect of the end of a flow that had done all its work.
        typer.echo(f"warning: the run is done, but Prefect does not know: {away}", err=True)
        return _report(recipe.workspace, record.run_id)


class _resumable:
    """Prints the line that resumes the run when a stage fails."""

    def __init__(self, workspace: str, recipe: str, overrides: list[str]) -> None:
        sets = " ".join(f"--set {shlex.quote(o)}" for o in overrides)
        self.workspace = workspace
        self.line = f"dpo run {shlex.quote(recipe)} {sets} --resume".replace("  ", " ")

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        from dpo_core.errors import DpoError
        from tasks.runs.record import own_run

        expected = error.exit_code if isinstance(error, DpoError) else 4
        if error is not None and expected == 4:
            record = own_run(self.workspace)
            typer.echo(f"to resume: {record.resume_line if record else self.line}", err=True)


def show(
    run_id: Annotated[str, typer.Argument(metavar="RUN", help="Name of a run; see `dpo runs`.")],
    workspace: Annotated[str, typer.Option(help="Workspace folder.")] = "./runs",
    as_json: JsonOption = False,
) -> None:
    """Show the table of a finished run."""
    report = _report(workspace, run_id)
    if as_json:
        typer.echo(report.model_dump_json())
    else:
        _show(report, workspace)


def _report(workspace: str, run_id: str) -> Any:
    """The report of a finished run or study."""
    from dpo_core.errors import RecipeError
    from tasks.reports.run_report import RunReport
    from tasks.reports.study_report import StudyReport
    from tasks.runs.record import list_runs
    from tasks.store.files import plain_name

    path = Path(workspace) / "runs" / plain_name(run_id) / "report.json"
    if not path.is_file():
        record = next((record for record in list_runs(workspace) if record.run_id == run_id), None)
        if record is None:
            raise RecipeError(f"no finished run named {run_id} in {workspace}", "List them with: dpo runs")
        goes_on = record.status == "running"
        raise RecipeError(
            f"the run {run_id} is not finished: its status is {record.status}",
            "Wait for its end" if goes_on else f"Go on: {record.resume_line}",
        )
    try:
        text = path.read_bytes()
        kind = StudyReport if "study" in json.loads(text) else RunReport
        return kind.model_validate_json(text)
    except ValueError as error:
        raise RecipeError(
            f"the report {path} is damaged or of another version",
            f"Run again: dpo run RECIPE --resume {run_id}",
        ) from error


def _show(report: Any, workspace: str) -> None:
    from rich.text import Text

    from flows.cli.terminal import terminal
    from tasks.reports import study_report
    from tasks.reports.run_report import RunReport
    from tasks.reports.run_text import terminal_table
    from tasks.reports.verdict import verdict
    from tasks.store.files import run_folder

    console = terminal()
    one_run = isinstance(report, RunReport)
    console.print(terminal_table(report) if one_run else study_report.terminal_table(report))
    if one_run:
        console.print(Text(verdict(report).headline, style="bold"))
    folder = run_folder(Path(workspace).absolute(), report.run.name)
    if one_run and report.model:
        model = report.model
        held = "known from an earlier run" if model.known else f"alias {model.alias}"
        console.print(f"model   {model.name} version {model.version}, {held}")
        console.print(f"weights {model.uri.removeprefix('file://')}", soft_wrap=True)
    console.print(f"page    {folder / 'page.html'}", soft_wrap=True)
    console.print("look    dpo ui", soft_wrap=True)


def _say(as_json: bool, text: str) -> None:
    typer.echo(text, err=as_json)
