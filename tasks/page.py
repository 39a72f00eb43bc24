"""The run page: one HTML file that says what a run found, readable without network, script or server."""

import re
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from tasks.page_figures import Figure, curve_figures, frontier_figure
from tasks.report import RunReport
from tasks.report_alarms import alarms
from tasks.report_numbers import duration, number, percent, scaled
from tasks.report_text import policy_metrics, reward_metrics, reward_use, stage_size
from tasks.report_verdict import verdict

MAX_SAMPLES = 12
MAX_TEXT = 1500  # characters of a prompt or completion that are shown


class Part(NamedTuple):
    """A section of the page; `absent` says why it has nothing to show."""

    key: str
    title: str
    absent: str = ""


class Curves(NamedTuple):
    stage: str
    figures: list[Figure]


def render(report: RunReport) -> str:
    """The whole page as HTML: self-contained, without script, text from models and data escaped.

    Sections without data are left out and named at the end with the reason. At most `MAX_SAMPLES` samples and
    `MAX_TEXT` characters of each text are shown, and the page says what it cut.
    """
    return fill("run_page.html.j2", _context(report))


def fill(template: str, context: dict[str, Any]) -> str:
    """One of the page templates with its values: everything escaped, nothing undefined."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("tasks", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        number=number, percent=percent, duration=duration, minus=_minus, clip=_clip, link=_link, scaled=scaled
    )
    return environment.get_template(template).render(**context)


def _context(report: RunReport) -> dict[str, Any]:
    evaluation = report.evaluation
    curves = [Curves(stage, curve_figures(stage, rows)) for stage, rows in report.curves.items()]
    curves = [group for group in curves if group.figures]
    frontier = frontier_figure(evaluation) if evaluation else None
    # The first stage that left an artifact is its maker; a later one with the same digest found it again.
    digests = {stage.sha256: stage.name for stage in reversed(report.stages) if stage.sha256}
    parts = [
        Part("policies", "Policies", "" if evaluation else "the run has no evaluation"),
        Part("frontier", "Reward against KL", "" if frontier else _no_frontier(report)),
        Part("reward", "Reward model", "" if report.reward_model else _no_reward_model(report)),
        Part("training", "Training", "" if curves else "no training metrics were recorded"),
        Part("gate", "Data gate", "" if report.gate else "no data gate result was recorded"),
        Part(
            "samples", "Samples", "" if evaluation and evaluation.samples else "no completions were recorded"
        ),
        Part("stages", "Stages and cost", "" if report.stages else "no stages were recorded"),
        Part("lineage", "Lineage", "" if digests or report.model else "no artifact digests were recorded"),
        Part("reproduce", "Reproduce"),
    ]
    names = {row.name for row in evaluation.policies} if evaluation else set()
    left_out = [part for part in parts if part.absent]
    if evaluation and "PPO" not in names:
        left_out.append(Part("ppo", "PPO baseline", "the run did not evaluate one"))
    return {
        "report": report,
        "verdict": verdict(report),
        "alarms": alarms(report),
        "parts": {part.key: part for part in parts if not part.absent},
        "left_out": left_out,
        "metrics": policy_metrics(evaluation) if evaluation else [],
        "frontier": frontier,
        "reward_metrics": reward_metrics(report.reward_model) if report.reward_model else [],
        "reward_use": reward_use(report),
        "curves": curves,
        "samples": evaluation.samples[:MAX_SAMPLES] if evaluation else [],
        "stage_size": stage_size,
        "producer": digests,
        "seconds_by_stage": report.cost.seconds_by_stage if report.cost else {},
        "total_seconds": report.cost.seconds if report.cost else report.run.seconds,
    }


def _no_frontier(report: RunReport) -> str:
    return "no policy has both a gain and a KL" if report.evaluation else "the run has no evaluation"


def _no_reward_model(report: RunReport) -> str:
    trained = any(stage.name == "train-reward" for stage in report.stages)
    return "no pairs were held out to measure it" if trained else "the run trained none"


def _minus(text: object) -> str:
    """The typographic minus where a number starts; hyphens elsewhere stay."""
    return re.sub(r"(?<!\S)(\(?)-(?=\d)", r"\1−", str(text))


def _clip(text: str) -> str:
    if len(text) <= MAX_TEXT:
        return text
    return f"{text[:MAX_TEXT]}… ({len(text) - MAX_TEXT:,} more characters)"


def _link(uri: str | None) -> str | None:
    """The address if a reader may follow it; None for anything else (`javascript:`, `s3:`, plain paths)."""
    return uri if uri and urlsplit(uri).scheme in ("http", "https", "file") else None
