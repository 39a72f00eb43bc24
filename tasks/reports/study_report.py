"""The report of a study: its data, HTML page, Markdown and terminal table."""

from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field, JsonValue, model_validator
from rich.table import Table as RichTable
from rich.text import Text

from dpo_core.config import Config
from dpo_core.study import DOMINATES, Claim, Study, StudySummary, claims, summarise
from dpo_core.system import write_atomic
from tasks.reports.run_page import Part, cost_facts, fill
from tasks.reports.run_report import RunCost, RunInfo, StageRow
from tasks.reports.run_text import fenced, markdown_table, plain, stage_size
from tasks.reports.study_figures import figures, write_picture
from tasks.reports.study_tables import (
    CLAIMS_HEAD,
    VERDICT_KIND,
    Table,
    claims_rows,
    measured_on,
    policies_table,
    settings_table,
    tables,
)


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

    @model_validator(mode="before")
    @classmethod
    def _of_earlier_version(cls, facts: Any) -> Any:
        """Rename `arm` in reports of earlier versions to `policy`."""
        if not isinstance(facts, dict) or not isinstance(facts.get("summary"), dict):
            return facts
        return facts | {part: _renamed(facts.get(part)) for part in ("study", "summary")}


def _renamed(value: Any) -> Any:
    if isinstance(value, list):
        return [_renamed(inner) for inner in value]
    if isinstance(value, dict):
        return {{"arm": "policy", "arms": "policies"}.get(key, key): _renamed(v) for key, v in value.items()}
    return value


class StudyHeadline(NamedTuple):
    text: str
    kind: Literal["good", "bad", "unclear", "plain"]


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
    write_atomic(page, render(report))
    write_atomic(folder / "summary.md", markdown(report))
    write_atomic(folder / "report.json", report.model_dump_json(indent=1))
    if report.study.drawn_policies():
        write_picture(report.study, report.summary, folder / "frontier.png")
    return page


def headline(report: StudyReport) -> StudyHeadline:
    """The verdict on the claim of dominance; if it was not measured, the names of the compared policies."""
    claim = next((claim for claim in report.claims if DOMINATES in claim.claim), None)
    if claim is None or claim.verdict == "not measured":
        drawn = report.study.drawn_policies()
        return StudyHeadline(f"Reward against KL: {', '.join(drawn) or 'no policy was measured'}", "plain")
    words = {
        "supported": claim.claim,
        "contradicted": claim.claim.replace(DOMINATES, "does not dominate"),
        "undecided": f"Whether {claim.claim} is undecided",
    }
    kinds: dict[str, Literal["good", "bad", "unclear"]] = {
        "supported": "good", "contradicted": "bad", "undecided": "unclear",
    }  # fmt: skip
    return StudyHeadline(words[claim.verdict], kinds[claim.verdict])


def _reward_words(study: Study) -> str:
    nature = "a learned proxy that can be exploited"
    if study.reward_is_true:
        nature = "known; a gain of policies that learned from it may not carry over to other measures"
    return f"Reward: {study.reward_name}, {nature}."


# ---------------------------------------------------------------------------------------------------- page


def render(report: StudyReport) -> str:
    """The whole page as HTML: self-contained, without script, every text escaped."""
    shown = tables(report.study, report.summary)
    parts = [
        Part(
            "frontier",
            "Reward against KL and compute",
            "" if report.study.drawn_policies() else "no policy was measured",
        ),
        Part("claims", "Claims", "" if report.claims else "the study has none of the policies in the claims"),
        *(Part(table.key, table.title) for table in shown),
        Part("stages", "Stages and cost", "" if report.stages else "no stages were recorded"),
        Part("reproduce", "Reproduce"),
    ]
    return fill(
        "study.html.j2",
        {
            "report": report,
            "headline": headline(report),
            "measured_on": measured_on(report.study, report.summary),
            "reward": _reward_words(report.study),
            "kinds": VERDICT_KIND,
            "figures": figures(report.study, report.summary),
            "tables": shown,
            "parts": {part.key: part for part in parts if not part.absent},
            "left_out": [part for part in parts if part.absent],
            "cost": cost_facts(report.cost),
            "stage_size": stage_size,
            "seconds_by_stage": report.cost.seconds_by_stage if report.cost else {},
            "total_seconds": report.cost.seconds if report.cost else report.run.seconds,
        },
    )


# -------------------------------------------------------------------------------------- Markdown, terminal


def markdown(report: StudyReport) -> str:
    """The report as GitHub Markdown: all tables, without figures."""
    parts = [
        f"# {plain(headline(report).text)}",
        plain(f"{measured_on(report.study, report.summary)} {_reward_words(report.study)}"),
    ]
    if report.claims:
        parts += ["## Claims", markdown_table(CLAIMS_HEAD, claims_rows(report.claims))]
    for table in tables(report.study, report.summary):
        rows = [[str(cell) for cell in row] for row in table.rows]
        parts += [f"## {plain(table.title)}", plain(table.caption), markdown_table(table.head, rows)]
    return "\n\n".join([*parts, "## Reproduce", fenced(report.run.command)]) + "\n"


def terminal_table(report: StudyReport) -> RichTable:
    """The terminal's summary of a study in 80 columns: headline, claims, policies, settings."""
    page = RichTable.grid(padding=(0, 0))
    colours = {"good": "green", "bad": "red", "unclear": "yellow", "plain": "default"}
    text, kind = headline(report)
    page.add_row(Text(text, style=f"bold {colours[kind]}"))
    page.add_row(Text(measured_on(report.study, report.summary)))
    judged = RichTable(title="Claims", title_justify="left")
    for name in ("Claim", "Verdict", "Found"):
        judged.add_column(name, ratio={"Claim": 2, "Found": 3}.get(name), no_wrap=name == "Verdict")
    for claim in report.claims:
        verdict = Text(claim.verdict, style=colours[VERDICT_KIND[claim.verdict]])
        judged.add_row(Text(f"{claim.claim} ({claim.claimed})"), verdict, Text(claim.found), end_section=True)
    if report.claims:
        page.add_row(judged)
    for table in (policies_table(report.summary), settings_table(report.study, report.summary, brief=True)):
        if table.rows:
            page.add_row(_rich(table))
    return page


def _rich(table: Table) -> RichTable:
    shown = RichTable(title=Text(table.title), title_justify="left")
    for index, name in enumerate(table.head):
        shown.add_column(Text(name), justify="left" if index < table.labels else "right")
    for row in table.rows:
        shown.add_row(*(Text(f"{cell.value}\n{cell.interval}".strip()) for cell in row), end_section=True)
    return shown
