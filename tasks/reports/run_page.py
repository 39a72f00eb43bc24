"""Renders the run page: one HTML file with a run's results, without script or network access."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from jinja2 import Environment, PackageLoader, StrictUndefined

from dpo_core.evaluation.compare import Comparison
from dpo_core.judging.results import WinRate
from dpo_core.methods.method import Panel
from dpo_core.methods.registry import methods
from tasks.recipe.policies import REFERENCE
from tasks.reports.alarms import alarms
from tasks.reports.figures import Figure, curve_figures, frontier_figure
from tasks.reports.forest_plot import difference_figures, win_rate_figure
from tasks.reports.format import duration, number, percent, scaled
from tasks.reports.lineage import chain, policy_lines
from tasks.reports.run_report import RunCost, RunReport, Sample, SuiteRow
from tasks.reports.run_text import policy_metrics, reward_metrics, reward_use, stage_size
from tasks.reports.tables import (
    COMPARISON_HEAD,
    WIN_RATE_HEAD,
    ComparisonTable,
    comparison_table,
    suite_table,
    win_rate_lines,
)
from tasks.reports.verdict import finding, mark, verdict
from tasks.store.files import path_of

MAX_SAMPLES = 12
MAX_TEXT = 1500  # characters of a prompt or completion that are shown


class Part(NamedTuple):
    """A section of the page; `absent` is the reason why it is left out."""

    key: str
    title: str
    absent: str = ""


class Curves(NamedTuple):
    stage: str
    figures: list[Figure]


class Compared(NamedTuple):
    """A candidate against one baseline: its table and its figures."""

    table: ComparisonTable
    figures: list[Figure]


class Fact(NamedTuple):
    """One number of the cost."""

    label: str
    value: str
    more: str = ""


def render(report: RunReport) -> str:
    """The whole page as HTML: self-contained, without script, text from models and data escaped.

    Sections without data are left out and listed at the end with the reason. At most `MAX_SAMPLES` samples
    and `MAX_TEXT` characters of each text are shown; the page states what was cut.
    """
    return fill("run_page.html.j2", _context(report))


def _curves(report: RunReport) -> list[Curves]:
    """The training curves of a report, each titled with its policy or, without one, its stage."""
    groups = []
    for index, (stage, rows) in enumerate(report.curves.items()):
        policy = report.policy_of(stage)
        title = report.label(policy) if policy else REFERENCE if stage == report.reference_stage else stage
        figures = curve_figures(f"curve-{index}", title, _panels(report, stage), rows)
        groups += [Curves(title, figures)] if figures else []
    return groups


def _panels(report: RunReport, stage: str) -> Sequence[Panel]:
    """The panels of a training's method; for SFT and the reward model, the panels of all methods."""
    by_name = methods()
    policy = report.policy_of(stage)
    if policy is not None and report.policies[policy].method in by_name:
        return by_name[report.policies[policy].method].curves
    chosen = [method for method in by_name.values() if method.stage == stage] or by_name.values()
    return list(dict.fromkeys(panel for method in chosen for panel in method.curves))


def fill(template: str, context: dict[str, Any]) -> str:
    """Render a page template. All values are escaped; an undefined one is an error."""
    environment = Environment(
        loader=PackageLoader("tasks.reports", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        number=number,
        percent=percent,
        duration=duration,
        minus=_minus,
        clip=_clip,
        link=_link,
        scaled=scaled,
        file_path=path_of,
    )
    return environment.get_template(template).render(**context)


def _context(report: RunReport) -> dict[str, Any]:
    report = report.named()
    evaluation = report.evaluation
    curves = _curves(report)
    frontier = frontier_figure(evaluation, report.label) if evaluation else None
    # An artifact is attributed to the first stage that produced it; later stages may have the same digest.
    digests = {stage.sha256: stage.name for stage in reversed(report.stages) if stage.sha256}
    parts = [
        Part(
            "samples", "Samples", "" if evaluation and evaluation.samples else "no completions were recorded"
        ),
        Part("frontier", "Reward against KL", "" if frontier else _no_frontier(report)),
        Part("policies", "Policies", "" if evaluation else "the run has no evaluation"),
        *measured_parts(report.win_rates, report.suites, report.comparisons),
        Part("reward", "Reward model", "" if report.reward_model else _no_reward_model(report)),
        Part("training", "Training", "" if curves else "no training metrics were recorded"),
        Part("gate", "Data gate", "" if report.gate else "no data gate result was recorded"),
        Part("cost", "Cost", "" if report.cost or report.stages else "no cost was recorded"),
        Part("lineage", "Lineage", "" if digests or report.model else "no artifact digests were recorded"),
        Part("reproduce", "Reproduce"),
    ]
    left_out = [part for part in parts if part.absent]
    if evaluation and report.policies and not report.samplers:
        left_out.append(Part("baseline", "Policy that learns from its own samples", "the recipe has none"))
    if report.decision is None:
        left_out.append(Part("decision", "Decision to promote", "the recipe does not request one"))
    return {
        "report": report,
        "verdict": verdict(report),
        "decision": report.decision,
        "mark": mark,
        "finding": finding(report) if report.decision and (evaluation or report.gate) else None,
        "alarms": alarms(report),
        "parts": {part.key: part for part in parts if not part.absent},
        "left_out": left_out,
        "metrics": policy_metrics(evaluation) if evaluation else [],
        "frontier": frontier,
        "reward_metrics": reward_metrics(report.reward_model) if report.reward_model else [],
        "reward_use": reward_use(report),
        "curves": curves,
        "cost": cost_facts(report.cost, report.win_rates),
        "chain": chain(report),
        "policy_lines": policy_lines(report),
        "stage_size": stage_size,
        "producer": digests,
        "seconds_by_stage": report.cost.seconds_by_stage if report.cost else {},
        "total_seconds": report.cost.seconds if report.cost else report.run.seconds,
        **measured_context(report.win_rates, report.suites, report.comparisons),
        **sample_context(evaluation.samples if evaluation else []),
    }


def measured_parts(
    win_rates: Sequence[WinRate], suites: Sequence[SuiteRow], comparisons: Sequence[Comparison]
) -> list[Part]:
    """The sections common to the pages of runs and evaluations."""
    return [
        Part("win-rates", "Win rates", "" if win_rates else "no judge compared answers"),
        Part("suites", "Tasks", "" if suites else "no suite was run"),
        Part("comparisons", "Comparisons", "" if comparisons else "no two models were compared on a suite"),
    ]


def measured_context(
    win_rates: Sequence[WinRate], suites: Sequence[SuiteRow], comparisons: Sequence[Comparison]
) -> dict[str, Any]:
    """Template values of these sections."""
    return {
        "win_rate_figure": win_rate_figure(win_rates),
        "win_rate_head": WIN_RATE_HEAD,
        "win_rate_lines": win_rate_lines(win_rates),
        "suites": suite_table(suites),
        "comparison_head": COMPARISON_HEAD,
        "comparisons": [
            Compared(comparison_table(comparison, suites), difference_figures(comparison, suites))
            for comparison in comparisons
        ],
    }


def sample_context(samples: Sequence[Sample]) -> dict[str, Any]:
    """The samples to show and the number recorded."""
    return {"samples": samples[:MAX_SAMPLES], "samples_recorded": len(samples)}


def cost_facts(cost: RunCost | None, win_rates: Sequence[WinRate] = ()) -> list[Fact]:
    """Time, tokens, compute, memory and judge cost, as far as recorded."""
    facts = []
    if cost:
        facts += [
            Fact("Wall-clock time", duration(cost.seconds)),
            Fact("Tokens trained", scaled(cost.tokens_trained, "")),
        ]
        if cost.flops is not None:
            facts.append(Fact("Compute", scaled(cost.flops, "FLOP")))
        if cost.peak_memory_bytes is not None:
            facts.append(Fact("Peak memory", scaled(cost.peak_memory_bytes, "B", 1024)))
    return facts + judge_facts(win_rates)


def judge_facts(win_rates: Sequence[WinRate]) -> list[Fact]:
    """The total cost and requests of the judge; empty if no judge was used."""
    paid = [rate.cost for rate in win_rates if rate.cost is not None]
    requests, cached = sum(rate.requests for rate in win_rates), sum(rate.cached for rate in win_rates)
    if not paid and not requests:
        return []
    value = f"{sum(paid):,.2f}" if paid else "no price set"
    return [Fact("Judge", value, f"{requests:,} requests, {cached:,} cached")]


def _no_frontier(report: RunReport) -> str:
    return "no policy has both a gain and a KL" if report.evaluation else "the run has no evaluation"


def _no_reward_model(report: RunReport) -> str:
    trained = any(stage.kind == "reward-model" for stage in report.stages)
    return "no pairs were held out to measure it" if trained else "the run trained none"


def _minus(text: object) -> str:
    """Replace the hyphen before a number by a minus sign; keep other hyphens."""
    return re.sub(r"(?<!\S)([(\[]?)-(?=\d)", r"\1−", str(text))


def _clip(text: str) -> str:
    if len(text) <= MAX_TEXT:
        return text
    return f"{text[:MAX_TEXT]}… ({len(text) - MAX_TEXT:,} more characters)"


def _link(uri: str | None) -> str | None:
    """The address if it is safe to link (http, https, file); None otherwise (`javascript:`, `s3:`, paths)."""
    return uri if uri and urlsplit(uri).scheme in ("http", "https", "file") else None
