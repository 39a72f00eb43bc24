"""The HTML page of `dpo evaluate` and `dpo compare`: one file without script or network access."""

from tasks.reports.evaluation_report import EvaluationReport, headline
from tasks.reports.format import duration
from tasks.reports.run_page import (
    Fact,
    Part,
    fill,
    judge_facts,
    measured_context,
    measured_parts,
    sample_context,
)


def render_evaluation(report: EvaluationReport) -> str:
    """The whole page as HTML: self-contained, without script, every text escaped.

    Sections without data are left out and named at the end with the reason.
    """
    parts = [
        *measured_parts(report.win_rates, report.suites, report.comparisons),
        Part("samples", "Samples", "" if report.samples else "no answers were recorded"),
        Part("cost", "Cost"),
        Part("models", "Models"),
        Part("reproduce", "Reproduce"),
    ]
    return fill(
        "evaluation.html.j2",
        {
            "report": report,
            "headline": headline(report),
            "parts": {part.key: part for part in parts if not part.absent},
            "left_out": [part for part in parts if part.absent],
            "cost": [Fact("Wall-clock time", duration(report.seconds)), *judge_facts(report.win_rates)],
            **measured_context(report.win_rates, report.suites, report.comparisons),
            **sample_context(report.samples),
        },
    )
