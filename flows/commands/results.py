"""Reads the report of a finished run or study and prints its tables, for `dpo run` and `dpo show`."""

import json
from pathlib import Path

import typer
from rich.text import Text

from dpo_core.errors import RecipeError
from flows.commands.terminal import terminal
from tasks.reports.run_document import run_document
from tasks.reports.run_report import RunReport
from tasks.reports.study_report import StudyReport, study_document
from tasks.reports.terminal import terminal as as_table
from tasks.reports.verdict import verdict
from tasks.runs.record import list_runs
from tasks.store.files import plain_name, run_folder


def read_report(workspace: str, run_id: str) -> RunReport | StudyReport:
    """The report of a finished run or study.

    Raises:
        RecipeError: there is no finished run of this name, or its report is damaged.
    """
    path = Path(workspace) / "runs" / plain_name(run_id) / "report.json"
    if not path.is_file():
        record = next((record for record in list_runs(workspace) if record.run_id == run_id), None)
        if record is None:
            raise RecipeError(f"no finished run named {run_id} in {workspace}", "List them with: dpo runs")
        raise RecipeError(
            f"the run {run_id} is not finished: its status is {record.status}",
            "Wait for its end" if record.status == "running" else f"Resume it: {record.resume_line}",
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


def print_report(report: RunReport | StudyReport, workspace: str, as_json: bool) -> None:
    """Print the report as JSON, or its tables, verdict and addresses."""
    if as_json:
        typer.echo(report.model_dump_json())
        return
    console = terminal()
    folder = run_folder(Path(workspace).absolute(), report.run.name)
    if isinstance(report, RunReport):
        console.print(as_table(run_document(report)))
        console.print(Text(verdict(report).headline, style="bold"))
        if model := report.model:
            state = "known from an earlier run" if model.known else f"alias {model.alias}"
            console.print(f"model   {model.name} version {model.version}, {state}")
            console.print(f"weights {model.uri.removeprefix('file://')}", soft_wrap=True)
    else:
        console.print(as_table(study_document(report)))
    console.print(f"page    {folder / 'page.html'}", soft_wrap=True)
    console.print("look    dpo ui", soft_wrap=True)
