"""Renders a run's report for the terminal (80 columns) and as GitHub Markdown."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from rich.table import Table
from rich.text import Text

from dpo_core.evaluation.compare import Comparison
from dpo_core.evaluation.policy_row import PolicyRow
from dpo_core.judging.results import WinRate
from dpo_core.rewards.quality import RewardQuality
from dpo_core.statistics.estimates import Estimate
from tasks.reports.alarms import alarms
from tasks.reports.format import Cell, cell, duration
from tasks.reports.run_report import Evaluation, RunReport, StageRow, SuiteRow
from tasks.reports.tables import (
    COMPARISON_HEAD,
    FINDINGS,
    WIN_RATE_HEAD,
    comparison_table,
    flat,
    rich_table,
    suite_table,
    win_rate_lines,
)
from tasks.reports.verdict import Verdict, finding, verdict


class Metric(NamedTuple):
    """One line of the policy table."""

    key: str
    label: str
    hint: str
    cells: list[Cell]


def policy_metrics(evaluation: Evaluation) -> list[Metric]:
    """The lines of the policy table, one cell per policy; optional metrics without values are left out."""
    lines = []
    for key, shown in PolicyRow.shown().items():
        values = [getattr(row, key) for row in evaluation.policies]
        if shown.always or any(value is not None for value in values):
            cells = [cell(value, shown.kind) for value in values]
            lines.append(Metric(key, shown.label, shown.hint, cells))
    return lines


def reward_metrics(quality: RewardQuality) -> list[Metric]:
    """The lines of the reward model's table, one cell each."""
    metrics: list[tuple[str, str, str, Estimate | float | None]] = [
        ("accuracy", "Accuracy", "share of held-out pairs ranked as labelled", quality.accuracy),
        ("ece", "Calibration error", "ECE, ten equal bins; biased upwards if pairs are few", quality.ece),
        ("brier", "Brier score", "chance is 0.25", quality.brier),
        ("nll", "NLL, nats", "chance is 0.693", quality.nll),
        ("temperature", "Best temperature", "above 1: overconfident; none if all or no pairs are right",
         quality.temperature),
        ("length", "Spearman with length", "reward against answer length", quality.length_spearman),
        ("gap", "Spearman of the gaps", "reward gap against length gap", quality.gap_spearman),
    ]  # fmt: skip
    return [
        Metric(key, label, hint, [cell(value, "share" if key == "accuracy" else "number")])
        for key, label, hint, value in metrics
    ]


def reward_use(report: RunReport) -> str:
    """One or two sentences on what the reward model was used for."""
    evaluation = report.evaluation
    if evaluation is None:
        return ""
    learners = [name for name, about in report.policies.items() if about.reward == "model"]
    learned = f"{', '.join(map(report.label, learners))} learned from it. " if learners else ""
    measure = f"{evaluation.reward_name}, not with it" if evaluation.reward_is_true else "it"
    return f"{learned}The policies were evaluated with {measure}."


def stage_size(stage: StageRow) -> str:
    """The size of the artifact: "1,200 rows", "134,515,008 parameters", or an en dash."""
    sizes = [(stage.rows, "rows"), (stage.parameters, "parameters")]
    return ", ".join(f"{count:,} {unit}" for count, unit in sizes if count is not None) or "–"


def _add_verdict(page: Table, shown: Verdict, reasons: int) -> None:
    """Add a headline in its colour, and its first reasons."""
    colour = {"good": "green", "bad": "red", "unclear": "yellow"}[shown.kind]
    page.add_row(Text(shown.headline, style=f"bold {colour}"))
    for reason in shown.reasons[:reasons]:
        page.add_row(Text(reason))


def terminal_measured(
    page: Table,
    win_rates: Sequence[WinRate],
    suites: Sequence[SuiteRow],
    comparisons: Sequence[Comparison],
    *,
    undecided: bool = True,
) -> None:
    """Add win rates, suites and comparisons to a page, without subsets and untested rows.

    Args:
        undecided: whether to list undecided differences; they are always counted.
    """
    if win_rates:
        keep = [0, 1, 2]
        lines = [line._replace(cells=[line.cells[i] for i in keep]) for line in win_rate_lines(win_rates)]
        page.add_row(rich_table("Win rates", [WIN_RATE_HEAD[i] for i in keep], lines))
    if suites:
        table = suite_table(suites)
        lines = [line._replace(cells=[*line.cells[:-1], Cell(line.cells[-1].value)]) for line in table.lines]
        page.add_row(rich_table("Tasks (95% interval)", table.head, lines))
    for comparison in comparisons:
        compared = comparison_table(comparison, suites)
        title = f"{compared.candidate} against {compared.baseline}: {compared.outcome}"
        keep = [0, 5, 1]
        shown = [line for line in compared.tested if undecided or line.cells[1] != FINDINGS["undecided"]]
        lines = [line._replace(cells=[line.cells[i] for i in keep]) for line in shown]
        page.add_row(rich_table(title, [COMPARISON_HEAD[i] for i in keep], lines) if lines else Text(title))


def terminal_table(report: RunReport) -> Table:
    """The terminal's summary of a run in 80 columns: verdict, stages with times, policies, alarms."""
    report = report.named()
    page = Table.grid(padding=(0, 0))
    if report.decision:
        _add_verdict(page, verdict(report), 1 + len(report.decision.reasons))
    _add_verdict(page, finding(report), 1)
    if report.trained:
        block = Table.grid(padding=(0, 2))
        for label, text in report.trained.lines:
            block.add_row(Text(label), Text(text))
        page.add_row(block)
    stages = Table(title=Text(f"Stages of {report.run.name}"), title_justify="left")
    for name in ("Stage", "State", "Time", "Artifact"):
        stages.add_column(name, justify="right" if name == "Time" else "left")
    for stage in report.stages:
        stages.add_row(Text(stage.name), stage.state, duration(stage.seconds), stage_size(stage))
    stages.add_section()
    stages.add_row("total", "", duration(report.run.seconds), "")
    page.add_row(stages)
    if report.evaluation:
        policies = Table(title="Policies (95% interval)", title_justify="left")
        policies.add_column("")
        for row in report.evaluation.policies:
            policies.add_column(report.label(row.name), justify="right")
        for metric in policy_metrics(report.evaluation):
            policies.add_row(
                metric.label,
                *(Text(f"{c.value}\n{c.interval}".strip()) for c in metric.cells),
                end_section=True,
            )
        page.add_row(policies)
    terminal_measured(page, report.win_rates, report.suites, report.comparisons, undecided=False)
    for alarm in alarms(report):
        page.add_row(Text(f"! {alarm.name}: {alarm.message}", style="yellow"))
    return page


def fenced(command: str) -> str:
    """A command as a code block, whose fence is longer than any sequence of backticks in it."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", command)), default=0))
    return f"{fence}sh\n{command}\n{fence}"


def plain(text: object) -> str:
    """Escape a text for Markdown, on one line: no markup, HTML or cell border."""
    flat = " ".join(str(text).split())
    return re.sub(r"([\\`*_{}\[\]<>|#~$])", r"\\\1", flat.replace("&", "&amp;"))


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    """A table of GitHub Markdown; the cells are escaped."""
    lines = [head, ["---"] * len(head), *([plain(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _listed(reasons: Sequence[str]) -> str:
    return "\n".join(f"- {plain(reason)}" for reason in reasons)


def markdown_measured(
    win_rates: Sequence[WinRate], suites: Sequence[SuiteRow], comparisons: Sequence[Comparison]
) -> list[str]:
    """Win rates, suites and comparisons as Markdown, without subsets and untested rows."""
    parts = []
    if win_rates:
        lines = [flat(line) for line in win_rate_lines(win_rates)]
        parts += ["## Win rates", markdown_table(["", *WIN_RATE_HEAD], lines)]
    if suites:
        table = suite_table(suites)
        head = ["", *map(plain, table.head)]
        parts += ["## Tasks", markdown_table(head, [flat(line) for line in table.lines])]
    for comparison in comparisons:
        compared = comparison_table(comparison, suites)
        parts.append(plain_heading(f"{compared.candidate} against {compared.baseline}: {compared.outcome}"))
        if compared.tested:
            parts.append(markdown_table(["", *COMPARISON_HEAD], [flat(line) for line in compared.tested]))
        if compared.left_out:
            parts.append(plain(f"Not compared: {'; '.join(compared.left_out)}."))
    return parts


def plain_heading(text: str) -> str:
    """A second-level heading."""
    return f"## {plain(text)}"


def _findings(report: RunReport) -> list[str]:
    """Markdown of the results: verdict with reasons, alarms, policies, comparisons, reward model."""
    report = report.named()
    decision, result = verdict(report), finding(report)
    raised = [f"**{plain(alarm.name)}**: {plain(alarm.message)}" for alarm in alarms(report)]
    if report.decision:
        parts = [f"# {plain(decision.headline)}", plain(decision.reasons[0]), _listed(decision.reasons[1:])]
        parts += [f"**{plain(result.headline)}**", _listed(result.reasons)]
    else:
        parts = [f"# {plain(result.headline)}", _listed(result.reasons)]
    if report.trained:
        parts.append("\n".join(f"- **{label}**: {plain(text)}" for label, text in report.trained.lines))
    if raised:
        parts += ["## Alarms", "\n".join(f"- {line}" for line in raised)]
    if report.evaluation:
        lines = [[metric.label, *map(str, metric.cells)] for metric in policy_metrics(report.evaluation)]
        parts += ["## Policies", "Brackets show 95% intervals, resampled by prompt."]
        head = ["", *(plain(report.label(row.name)) for row in report.evaluation.policies)]
        parts.append(markdown_table(head, lines))
    parts += markdown_measured(report.win_rates, report.suites, report.comparisons)
    if report.reward_model:
        lines = [[m.label, str(m.cells[0]), m.hint] for m in reward_metrics(report.reward_model)]
        parts += [
            "## Reward model",
            plain(f"{report.reward_model.pairs:,} held-out pairs. {reward_use(report)}"),
        ]
        parts.append(markdown_table(["", "Value", ""], lines))
    return parts


def note(report: RunReport, page: str) -> str:
    """A short Markdown report for the tracked run's description. `page` is the address of the run page."""
    about = str(report.notes.get("description", ""))
    parts = [*_findings(report), *([plain(about)] if about else [])]
    return "\n\n".join([*parts, f"Curves, samples, stages and lineage: {page}"]) + "\n"


def markdown(report: RunReport) -> str:
    """The report as GitHub Markdown for a Prefect artifact, without samples and curves."""
    report = report.named()
    parts = _findings(report)
    if report.stages:
        stages = [
            [stage.name, stage.state, duration(stage.seconds), stage_size(stage), (stage.sha256 or "–")[:12]]
            for stage in report.stages
        ]
        parts += ["## Stages", markdown_table(["Stage", "State", "Time", "Artifact", "Digest"], stages)]
    if report.gate:
        gate = [
            [row.subject, f"{row.rows:,}", f"{row.dropped:,}", "refused" if row.refused else "passed", rule]
            for row in report.gate
            for rule in [", ".join(f.rule for f in row.findings if not f.passed) or "none"]
        ]
        head = ["Data", "Rows", "Dropped", "Gate", "Failed rules"]
        parts += ["## Data gate", markdown_table(head, gate)]
    parts += ["## Reproduce", fenced(report.run.command)]
    return "\n\n".join(parts) + "\n"
