"""Reports as a reader sees them: the page, Markdown, and a terminal of 80 columns."""

import io

from rich.console import Console

from tasks.reports.document import Document
from tasks.reports.evaluation_report import EvaluationReport, evaluation_document
from tasks.reports.html import html
from tasks.reports.markdown import markdown
from tasks.reports.run_document import run_document
from tasks.reports.run_report import RunReport
from tasks.reports.study_report import StudyReport, study_document
from tasks.reports.terminal import terminal

Report = RunReport | EvaluationReport | StudyReport


def document(report: Report) -> Document:
    if isinstance(report, RunReport):
        return run_document(report)
    return study_document(report) if isinstance(report, StudyReport) else evaluation_document(report)


def page(report: Report) -> str:
    return html(document(report))


def text(report: Report) -> str:
    return markdown(document(report))


def note(report: Report) -> str:
    """The description of a run in MLflow."""
    return markdown(document(report), brief=True)


def shown(report: Report) -> str:
    out = io.StringIO()
    Console(file=out, width=80, color_system=None).print(terminal(document(report)))
    return out.getvalue()
