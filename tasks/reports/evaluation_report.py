"""The report of `dpo evaluate` and `dpo compare`: its data, headline, Markdown and terminal table."""

from datetime import datetime
from typing import Literal, NamedTuple

from pydantic import Field, JsonValue
from rich.table import Table
from rich.text import Text

from dpo_core.config import Config
from dpo_core.evaluation.compare import Comparison
from dpo_core.judging.results import WinRate
from tasks.reports.format import duration, percent
from tasks.reports.run_report import Sample, SuiteRow
from tasks.reports.run_text import fenced, markdown_measured, markdown_table, plain, terminal_measured
from tasks.reports.tables import outcome


class EvaluatedModel(Config):
    """An evaluated model."""

    name: str
    """The user's name for it, shown in the tables."""
    sha256: str
    """Digest of the weights."""


class EvaluationReport(Config):
    """The data that the page, the terminal tables and the Markdown of an evaluation show."""

    models: list[EvaluatedModel] = Field(min_length=1)
    suites: list[SuiteRow] = Field(default_factory=list)
    comparisons: list[Comparison] = Field(default_factory=list)
    win_rates: list[WinRate] = Field(default_factory=list)
    samples: list[Sample] = Field(default_factory=list)
    command: str
    """The exact command that repeats the evaluation."""
    finished_at: datetime
    hardware: str
    seconds: float
    notes: dict[str, JsonValue] = Field(default_factory=dict)


class EvaluationHeadline(NamedTuple):
    text: str
    kind: Literal["good", "bad", "unclear", "plain"]
    reasons: list[str]


def headline(report: EvaluationReport) -> EvaluationHeadline:
    """The result of the first comparison; without one, the win rate or the names of the models.

    It counts the tested measures on which the candidate is better or worse. It does not call the candidate
    equal: an undecided difference is not evidence of equality.
    """
    suites = list(dict.fromkeys(row.title for row in report.suites))
    scope = [f"{len(suites)} suite{'' if len(suites) == 1 else 's'}: {', '.join(suites)}."] if suites else []
    scope += [_contaminated(row) for row in report.suites if row.contaminated]
    judged = [_judged(rate) for rate in report.win_rates]
    if not report.comparisons:
        if judged:
            return EvaluationHeadline(
                judged[0], "plain", scope or ["Answers to the same prompts were judged."]
            )
        return EvaluationHeadline(
            f"Evaluation of {' and '.join(m.name for m in report.models)}", "plain", scope
        )
    reasons = [f"{c.candidate} against {c.baseline}: {outcome(c)}." for c in report.comparisons]
    reasons += [f"{sentence}." for sentence in judged] + scope
    return _result(report.comparisons[0], reasons)


def _result(first: Comparison, reasons: list[str]) -> EvaluationHeadline:
    tested = [row.finding for row in first.rows if row.p_holm is not None]
    if not tested:
        text = f"The suites could not compare {first.candidate} with {first.baseline}"
        return EvaluationHeadline(text, "unclear", [*first.left_out[:3], *reasons])
    better, worse = tested.count("better"), tested.count("worse")
    of = f"of {len(tested)} measure{'' if len(tested) == 1 else 's'}"
    than = f"than {first.baseline} on"
    if better and worse:
        text = f"{first.candidate} is better {than} {better} and worse on {worse} {of}"
        return EvaluationHeadline(text, "unclear", reasons)
    if better:
        return EvaluationHeadline(f"{first.candidate} is better {than} {better} {of}", "good", reasons)
    if worse:
        return EvaluationHeadline(f"{first.candidate} is worse {than} {worse} {of}", "bad", reasons)
    return EvaluationHeadline(
        f"No difference between {first.candidate} and {first.baseline} is shown", "unclear", reasons
    )


def _contaminated(row: SuiteRow) -> str:
    return f"{row.contaminated:,} of {row.items:,} items of {row.title} are in the training data."


def _judged(rate: WinRate) -> str:
    interval = f"{percent(rate.rate.low)} to {percent(rate.rate.high)}"
    won = f"{rate.a} wins {percent(rate.rate.value)} ({interval}) against {rate.b}"
    return f"{won} on {rate.rate.n:,} prompts, judged by {rate.judge}"


def markdown(report: EvaluationReport) -> str:
    """The report as GitHub Markdown: all tables, without figures and samples."""
    summary = headline(report)
    parts = [f"# {plain(summary.text)}", "\n".join(f"- {plain(reason)}" for reason in summary.reasons)]
    parts += markdown_measured(report.win_rates, report.suites, report.comparisons)
    models = [[model.name, model.sha256] for model in report.models]
    parts += ["## Models", markdown_table(["Model", "sha256 of the weights"], models)]
    parts += ["## Reproduce", fenced(report.command)]
    return "\n\n".join(part for part in parts if part) + "\n"


def terminal_table(report: EvaluationReport) -> Table:
    """The terminal's summary of an evaluation in 80 columns: headline, models, win rates, suites,
    comparisons."""
    summary = headline(report)
    colours = {"good": "green", "bad": "red", "unclear": "yellow", "plain": "default"}
    page = Table.grid(padding=(0, 0))
    page.add_row(Text(summary.text, style=f"bold {colours[summary.kind]}"))
    for reason in summary.reasons:
        page.add_row(Text(reason))
    for model in report.models:
        page.add_row(Text(f"{model.name}: weights {model.sha256[:12]}"))
    terminal_measured(page, report.win_rates, report.suites, report.comparisons)
    page.add_row(Text(f"{duration(report.seconds)} on {report.hardware}"))
    return page
