"""The report of `dpo evaluate` and `dpo compare`: its data, its headline, and its document."""

from datetime import datetime
from typing import NamedTuple

from pydantic import Field, JsonValue

from dpo_core.config import Config
from dpo_core.evaluation.compare import Comparison
from dpo_core.judging.results import WinRate
from dpo_core.statistics.format import duration, interval
from tasks.reports.document import (
    Bullets,
    Cell,
    Code,
    Column,
    Document,
    Item,
    Line,
    Section,
    Span,
    Table,
    Terms,
    Tone,
)
from tasks.reports.measured import (
    cost_terms,
    glossary_section,
    main_measures,
    measured_sections,
    outcome,
    samples_section,
)
from tasks.reports.run_report import Sample, SuiteRow


class EvaluatedModel(Config):
    """An evaluated model."""

    name: str
    """The user's name for it."""
    sha256: str
    """Digest of the weights."""
    objective: str = ""
    """Objective or method that trained it, if a run of the workspace did."""


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

    def label(self, name: str) -> str:
        """The displayed name of a model: of two, `A (kto)`, or `A (name)` if no run trained it."""
        for letter, model in zip("AB", self.models, strict=False):
            if model.name == name and len(self.models) > 1:
                return f"{letter} ({model.objective or name})"
        return name


class EvaluationHeadline(NamedTuple):
    text: str
    kind: Tone
    reasons: list[str]


def headline(report: EvaluationReport) -> EvaluationHeadline:
    """The result of the first comparison; without one, the win rate or the main measure of each suite.

    It counts the tested measures on which the candidate is better or worse. It does not call the candidate
    equal: an undecided difference is not evidence of equality.
    """
    suites = list(dict.fromkeys(row.title for row in report.suites))
    scope = [f"{len(suites)} suite{'' if len(suites) == 1 else 's'}: {', '.join(suites)}."] if suites else []
    scope += dict.fromkeys(
        f"{row.contaminated:,} of {row.items:,} items of {row.title} are in the training data."
        for row in report.suites
        if row.contaminated
    )
    judged = [_judged(report, rate) for rate in report.win_rates]
    if report.comparisons:
        reasons = [
            f"{report.label(c.candidate)} against {report.label(c.baseline)}: {outcome(c)}."
            for c in report.comparisons
        ]
        reasons += [f"{sentence}." for sentence in judged] + scope
        return _result(report, report.comparisons[0], reasons)
    if judged:
        return EvaluationHeadline(judged[0], "plain", scope or ["Answers to the same prompts were judged."])
    names = " and ".join(report.label(model.name) for model in report.models)
    measures = main_measures(report.suites) if len(report.models) == 1 else []
    if len(measures) == 1:
        return EvaluationHeadline(f"{names}: {measures[0]}", "plain", scope)
    return EvaluationHeadline(f"Evaluation of {names}", "plain", [*(f"{m}." for m in measures), *scope])


def _result(report: EvaluationReport, first: Comparison, reasons: list[str]) -> EvaluationHeadline:
    ours, theirs = report.label(first.candidate), report.label(first.baseline)
    tested = [row for row in first.rows if row.p_holm is not None]
    if not tested:
        text = f"The suites could not compare {ours} with {theirs}"
        return EvaluationHeadline(text, "unclear", [*first.left_out[:3], *reasons])
    counts = sorted({row.difference.n for row in tested})
    prompts = f"on {' to '.join(f'{n:,}' for n in dict.fromkeys((counts[0], counts[-1])))} prompts"
    findings = [row.finding for row in tested]
    better, worse = findings.count("better"), findings.count("worse")
    of = f"of {len(tested)} measure{'' if len(tested) == 1 else 's'}, {prompts}"
    if better and worse:
        text = f"{ours} is better than {theirs} on {better} and worse on {worse} {of}"
        return EvaluationHeadline(text, "unclear", reasons)
    if better:
        return EvaluationHeadline(f"{ours} is better than {theirs} on {better} {of}", "good", reasons)
    if worse:
        return EvaluationHeadline(f"{ours} is worse than {theirs} on {worse} {of}", "bad", reasons)
    text = f"No difference between {ours} and {theirs} is shown {prompts}"
    return EvaluationHeadline(text, "unclear", reasons)


def _judged(report: EvaluationReport, rate: WinRate) -> str:
    won = f"{report.label(rate.a)} wins {interval(rate.rate, 'share')} against {report.label(rate.b)}"
    return f"{won} on {rate.rate.n:,} prompts, judged by {rate.judge}"


def evaluation_document(report: EvaluationReport) -> Document:
    """The document of an evaluation."""
    summary = headline(report)
    return Document(
        title=summary.text,
        eyebrow="Evaluation",
        time=report.finished_at,
        headline=summary.text,
        tone=summary.kind,
        reasons=[Bullets([Item(reason) for reason in summary.reasons])] if summary.reasons else [],
        sections=[
            *measured_sections(
                report.win_rates, report.suites, report.comparisons, report.label, undecided_brief=True
            ),
            samples_section(report.samples, report.label),
            Section("models", "Models", [_model_table(report)], "brief"),
            _reproduce(report),
            glossary_section(),
        ],
    )


def _model_table(report: EvaluationReport) -> Table:
    caption = "Digests are SHA-256 of the weights, shortened on screen: one click selects the full digest."
    lines = [
        Line(report.label(model.name), [Cell(model.name), Cell([Span(model.sha256, "digest")])])
        for model in report.models
    ]
    return Table("Model table", caption, "Model", [Column("Name", "text"), Column("Digest", "text")], lines)


def _reproduce(report: EvaluationReport) -> Section:
    finished = f"{report.finished_at:%Y-%m-%d %H:%M:%S %Z}".strip()
    terms = [
        ("Finished", Cell(f"{finished}, after {duration(report.seconds)}")),
        ("Hardware", Cell(report.hardware)),
        *((name, Cell(str(value))) for name, value in report.notes.items()),
    ]
    judges = cost_terms(None, report.win_rates)
    return Section("reproduce", "Reproduce", [Code("Command", report.command), Terms(terms), judges], "brief")
