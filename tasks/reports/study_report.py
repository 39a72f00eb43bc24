"""The report of a study: its data, its headline, and its document."""

from pathlib import Path

from pydantic import Field, JsonValue

from dpo_core.config import Config
from dpo_core.study import DOMINATES, Claim, Study, StudySummary, claims, summarise
from dpo_core.system import write_atomic
from tasks.reports.document import (
    Block,
    Bullets,
    Cell,
    Column,
    Document,
    Figures,
    Item,
    Line,
    Section,
    Table,
    Tone,
)
from tasks.reports.html import html
from tasks.reports.markdown import markdown
from tasks.reports.measured import cost_terms, glossary_section, reproduce_section, stage_table
from tasks.reports.run_report import RunCost, RunInfo, StageRow
from tasks.reports.study_figures import figures, write_picture
from tasks.reports.study_tables import measured_on, study_tables

_KINDS: dict[str, Tone] = {
    "supported": "good", "contradicted": "bad", "undecided": "unclear", "not measured": "plain",
}  # fmt: skip


class StudyReport(Config):
    """The data that the page, the terminal tables and the Markdown show."""

    run: RunInfo
    study: Study
    summary: StudySummary
    claims: list[Claim]
    stages: list[StageRow] = Field(default_factory=list)
    cost: RunCost | None = None
    """Cost of the whole study."""
    notes: dict[str, JsonValue] = Field(default_factory=dict)


def study_report(
    study: Study,
    run: RunInfo,
    stages: list[StageRow] | None = None,
    cost: RunCost | None = None,
    notes: dict[str, JsonValue] | None = None,
) -> StudyReport:
    """Summarise the study, check the claims, and combine both with the run's facts."""
    summary = summarise(study)
    return StudyReport(
        run=run, study=study, summary=summary, claims=claims(study, summary), stages=stages or [], cost=cost,
        notes=notes or {},
    )  # fmt: skip


def write_report(report: StudyReport, folder: Path) -> Path:
    """Write `page.html`, `summary.md`, `report.json` and, if there are policies to draw, `frontier.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "page.html"
    document = study_document(report)
    write_atomic(page, html(document))
    write_atomic(folder / "summary.md", markdown(document))
    write_atomic(folder / "report.json", report.model_dump_json(indent=1))
    if report.study.drawn_policies():
        write_picture(report.study, report.summary, folder / "frontier.png")
    return page


def headline(report: StudyReport) -> tuple[str, Tone]:
    """The verdict on the claim of dominance; if it was not measured, the names of the compared policies."""
    claim = next((claim for claim in report.claims if DOMINATES in claim.claim), None)
    if claim is None or claim.verdict == "not measured":
        drawn = report.study.drawn_policies()
        return f"Reward against KL: {', '.join(drawn) or 'no policy was measured'}", "plain"
    words = {
        "supported": claim.claim,
        "contradicted": claim.claim.replace(DOMINATES, "does not dominate"),
        "undecided": f"Whether {claim.claim} is undecided",
    }
    return words[claim.verdict], _KINDS[claim.verdict]


def _reward_words(study: Study) -> str:
    nature = "a learned proxy that can be exploited"
    if study.reward_is_true:
        nature = "known; a gain of policies that learned from it may not carry over to other measures"
    return f"Reward: {study.reward_name}, {nature}."


def study_document(report: StudyReport) -> Document:
    """The document of a study."""
    text, tone = headline(report)
    scope = measured_on(report.study, report.summary)
    drawn = figures(report.study, report.summary)
    stages: list[Block] = [
        cost_terms(report.cost),
        stage_table(report.stages, report.cost, report.run.seconds),
    ]
    claims = [_claims_table(report.claims)] if report.claims else []
    return Document(
        title=f"{report.run.name}: {text}",
        eyebrow=f"{report.run.name} · recipe {report.run.recipe}",
        time=report.run.finished_at,
        headline=text,
        tone=tone,
        reasons=[Bullets([Item(scope), Item(_reward_words(report.study)), Item(report.run.hardware)])],
        sections=[
            Section(
                "frontier",
                "Reward against KL and compute",
                [Figures(drawn, wide=True)] if drawn else [],
                "page",
                "no policy was measured",
            ),
            Section("claims", "Claims", claims, "brief", "the study has none of the policies in the claims"),
            *study_tables(report.study, report.summary),
            Section(
                "stages", "Stages and cost", stages if report.stages else [], absent="no stages were recorded"
            ),
            reproduce_section(report.run, dict(report.notes)),
            glossary_section(),
        ],
        footer=scope + (" No correction for the number of claims was made." if claims else ""),
    )


def _claims_table(listed: list[Claim]) -> Table:
    caption = (
        "Published claims, compared with this study's model, data and settings. A claim is undecided if its "
        "interval contains both sides, or with fewer than three seeds."
    )
    columns = [Column("Claimed", "text"), Column("Verdict", "text"), Column("Found", "long")]
    lines = [
        Line(c.claim, [Cell(c.claimed), Cell(c.verdict, tone=_KINDS[c.verdict]), Cell(c.found)])
        for c in listed
    ]
    return Table("Claims table", caption, "Claim", columns, lines)
