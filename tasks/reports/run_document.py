"""The report of a run as a document: verdict, what was trained, alarms, and sections of results."""

from collections.abc import Mapping, Sequence

from dpo_core.evaluation.policy_row import PolicyRow
from dpo_core.methods.method import Panel
from dpo_core.methods.registry import methods
from dpo_core.models.folder import is_denoiser
from dpo_core.rewards.quality import RewardQuality
from dpo_core.statistics.format import number
from expectations.report import Finding
from tasks.recipe.policies import REFERENCE
from tasks.reports.alarms import alarms
from tasks.reports.document import (
    DASH,
    Block,
    Bullets,
    Cell,
    Chain,
    Code,
    Column,
    Document,
    Figures,
    Fold,
    Item,
    Line,
    Paragraph,
    Section,
    Span,
    Subheading,
    Table,
    Terms,
    Tone,
    cell,
)
from tasks.reports.figures import curve_figures, curves_of, ends_in_words, frontier_figure
from tasks.reports.lineage import chain
from tasks.reports.measured import (
    cost_terms,
    glossary_section,
    measured_sections,
    place,
    reproduce_section,
    samples_section,
    stage_table,
)
from tasks.reports.run_report import Evaluation, GateRow, RunReport
from tasks.reports.verdict import finding, verdict
from tasks.store.files import path_of

FEWEST_STEPS = 10
"""A training with fewer logged steps is shown in numbers, not in figures."""


def run_document(report: RunReport) -> Document:
    """The document of a run. Sections without data have the reason why."""
    evaluation = report.evaluation
    return Document(
        title=f"{report.run.name}: {verdict(report).headline}",
        eyebrow=f"{report.run.name} · recipe {report.run.recipe}",
        time=report.run.finished_at,
        headline=verdict(report).headline,
        tone=verdict(report).kind,
        reasons=_reasons(report),
        sections=[
            *_lead_sections(report),
            samples_section(evaluation.samples if evaluation else [], report.label),
            _frontier_section(report),
            _policies_section(report),
            *measured_sections(
                report.win_rates, report.suites, report.comparisons, report.label, undecided_brief=False
            ),
            _reward_section(report),
            _training_section(report),
            _gate_section(report.gate),
            _cost_section(report),
            _lineage_section(report),
            reproduce_section(report.run, dict(report.notes), report.recipe_text),
            glossary_section(),
            *_left_out(report),
        ],
    )


def _reasons(report: RunReport) -> list[Block]:
    shown = verdict(report)
    none = report.evaluation is not None and not alarms(report)
    quiet = [Item("No alarms.")] if none else []
    if report.decision is None:
        return [Bullets([*map(Item, shown.reasons), *quiet])]
    blocks: list[Block] = [Paragraph(shown.reasons[0], small=False), Bullets(shown.rules)]
    if report.evaluation or report.gate:
        result = finding(report)
        blocks += [Subheading(result.headline), Bullets([*map(Item, result.reasons), *quiet])]
    return blocks


def _lead_sections(report: RunReport) -> list[Section]:
    trained = report.trained.lines if report.trained else []
    raised = [(alarm.name, alarm.message) for alarm in alarms(report)]
    every = [
        ("trained", "What was trained", Terms([(label, Cell(words)) for label, words in trained])),
        ("alarms", "Alarms", Terms([(name, Cell(message)) for name, message in raised], "alarms")),
    ]
    return [Section(key, title, [terms], "brief", lead=True) for key, title, terms in every if terms.items]


def _left_out(report: RunReport) -> list[Section]:
    """What a run may have that is no section of its own."""
    left_out = []
    if report.evaluation and report.policies and not report.samplers:
        left_out.append(("Policy that learns from its own samples", "the recipe has none"))
    if report.decision is None:
        left_out.append(("Decision to promote", "the recipe does not request one"))
    return [Section("", title, absent=reason) for title, reason in left_out]


# ------------------------------------------------------------------------------------------------- policies


def _frontier_section(report: RunReport) -> Section:
    evaluation = report.evaluation
    figure = frontier_figure(evaluation, report.label) if evaluation else None
    absent = "no policy has both a gain and a KL" if evaluation else "the run has no evaluation"
    words = "Reward gain of each policy over SFT, and its KL to the reference."
    blocks: list[Block] = [Paragraph(words), Figures([figure], wide=True)] if figure else []
    return Section("frontier", "Reward against KL", blocks, "page", absent)


def policy_table(evaluation: Evaluation, report: RunReport) -> Table:
    """One line per metric, one column per policy; optional metrics without values are left out."""
    lines = []
    tokens = any(row.length is not None for row in evaluation.policies)  # else images, without log-probs
    for key, shown in PolicyRow.shown().items():
        values = [getattr(row, key) for row in evaluation.policies]
        if (shown.always and tokens) or any(value is not None for value in values):
            counts = [getattr(value, "n", evaluation.n_prompts) for value in values]
            cells = [
                cell(value, shown.kind, "" if n == evaluation.n_prompts else f"n = {n:,}")
                for value, n in zip(values, counts, strict=True)
            ]
            lines.append(Line(shown.label, cells, shown.hint))
    caption = (
        f"{evaluation.n_prompts:,} prompts, {evaluation.samples_per_prompt} "
        f"sample{'s' if evaluation.samples_per_prompt != 1 else ''} each. Reward: {evaluation.reward_name}"
        f"{'' if evaluation.reward_is_true else ' (learned proxy)'}. Intervals are at 95%."
    )
    columns = [Column(report.label(row.name)) for row in evaluation.policies]
    return Table("Policy table", caption, "", columns, lines, wide=True, brief_hints=False)


def _policies_section(report: RunReport) -> Section:
    evaluation = report.evaluation
    blocks = [policy_table(evaluation, report)] if evaluation else []
    return Section("policies", "Policies", blocks, "brief", "the run has no evaluation")


def _reward_section(report: RunReport) -> Section:
    quality = report.reward_model
    if quality is None:
        trained = any(stage.kind == "reward-model" for stage in report.stages)
        absent = "no pairs were held out to measure it" if trained else "the run trained none"
        return Section("reward", "Reward model", absent=absent)
    words = f"The reward model on {quality.pairs:,} held-out pairs. {_reward_use(report)}"
    caption = "Probabilities are σ of the gap on the scale of the loss, the two answers in random order."
    table = Table("Reward model table", caption, "", [Column("Value")], _reward_lines(quality))
    return Section("reward", "Reward model", [Paragraph(words), table], "brief")


def _reward_lines(quality: RewardQuality) -> list[Line]:
    shown = [
        ("Accuracy", cell(quality.accuracy, "share"), "share of held-out pairs ranked as labelled"),
        ("Calibration error", cell(quality.ece), "ECE, ten equal bins; biased upwards if pairs are few"),
        ("Brier score", cell(quality.brier), "chance is 0.25"),
        ("NLL, nats", cell(quality.nll), "chance is 0.693"),
        (
            "Best temperature",
            cell(quality.temperature),
            "above 1: overconfident; none if all or no pairs are right",
        ),
        ("Spearman with length", cell(quality.length_spearman), "reward against answer length"),
        ("Spearman of the gaps", cell(quality.gap_spearman), "reward gap against length gap"),
    ]
    return [Line(label, [value], hint) for label, value, hint in shown]


def _reward_use(report: RunReport) -> str:
    """One or two sentences on what the reward model was used for."""
    evaluation = report.evaluation
    if evaluation is None:
        return ""
    learners = [report.label(name) for name, about in report.policies.items() if about.reward == "model"]
    learned = f"{', '.join(learners)} learned from it. " if learners else ""
    measure = f"{evaluation.reward_name}, not with it" if evaluation.reward_is_true else "it"
    return f"{learned}The policies were evaluated with {measure}."


# ------------------------------------------------------------------------------------------------- training


def _training_section(report: RunReport) -> Section:
    blocks: list[Block] = []
    drawn = False
    for index, (stage, rows) in enumerate(report.curves.items()):
        policy = report.policy_of(stage)
        title = report.label(policy) if policy else report.stage_label(stage)
        title = REFERENCE if stage == report.reference_stage else title
        panels = _panels(report, stage)
        if not any(curves_of(panel, rows) for panel in panels):
            continue
        if len(rows) < FEWEST_STEPS:
            blocks += [Subheading(title), Paragraph(_in_numbers(panels, rows, policy in report.samplers))]
        else:
            drawn = True
            blocks += [Subheading(title), Figures(curve_figures(f"curve-{index}", title, panels, rows))]
    words = (
        "Arrows go from the mean of the first tenth of the logged steps to the mean of the last tenth. "
        "Dotted lines: the value for comparison (0, chance, or a ratio of 1). Curves of more than 200 points "
        "are averaged over neighbours."
    )
    intro = [Paragraph(words)] if drawn else []
    return Section("training", "Training", [*intro, *blocks], "page", "no training metrics were recorded")


def _panels(report: RunReport, stage: str) -> Sequence[Panel]:
    """The panels of a training's method; for SFT and the reward model, the panels of all methods."""
    by_name = methods()
    policy = report.policy_of(stage)
    if policy is not None and report.policies[policy].method in by_name:
        return by_name[report.policies[policy].method].curves
    chosen = [method for method in by_name.values() if method.stage == stage] or by_name.values()
    return list(dict.fromkeys(panel for method in chosen for panel in method.curves))


def _in_numbers(panels: Sequence[Panel], rows: Sequence[dict[str, float]], samples: bool) -> str:
    """`3 optimiser steps, from the first to the last. Loss: 0.693 → 0.650. …`"""
    count = int(max(row.get("step", 0) for row in rows))
    unit = "round" if samples else "optimiser step"
    ends = [f"{panel.title}: {ends_in_words(lines)}" for panel in panels if (lines := curves_of(panel, rows))]
    steps = f"{count:,} {unit}{'' if count == 1 else 's'}"
    return f"{steps}, from the first to the last. {'. '.join(ends)}."


# ----------------------------------------------------------------------------------------------------- gate


def _gate_section(gate: Sequence[GateRow]) -> Section:
    blocks: list[Block] = []
    for row in gate:
        words = [Span(f"{row.rows:,} rows, {row.dropped:,} dropped.")]
        if row.docs_uri:
            words += [Span(" Full report: "), *place(row.docs_uri)]
        blocks += [Subheading(f"{row.subject}: {'refused' if row.refused else 'passed'}"), Paragraph(words)]
        failed = [finding for finding in row.findings if not finding.passed]
        passed = [finding for finding in row.findings if finding.passed]
        if failed:
            blocks.append(_rules(f"Rules on {row.subject}, failed", failed))
        if passed:
            summary = f"{len(passed)} rule{'s' if len(passed) != 1 else ''} passed or skipped"
            blocks.append(Fold(summary, [_rules(f"Rules on {row.subject}, passed", passed)]))
    return Section("gate", "Data gate", blocks, absent="no data gate result was recorded")


def _rules(name: str, findings: Sequence[Finding]) -> Table:
    columns = [
        Column("Result", "text"), Column("Count"), Column("Measured"), Column("Limit", "text"),
        Column("Finding", "long"),
    ]  # fmt: skip
    return Table(name, "", "Rule", columns, [Line(f.rule, _finding_cells(f)) for f in findings])


def _finding_cells(finding: Finding) -> list[Cell]:
    tone: Tone = "bad" if finding.severity == "critical" else "unclear"
    state = Cell(finding.severity, tone=tone)
    if finding.passed:
        state = Cell("skipped", tone="plain") if finding.skipped else Cell("passed", tone="good")
    rows = "" if finding.passed else ", ".join(map(str, finding.rows[:8]))
    return [
        state,
        Cell(f"{finding.count:,}"),
        cell(finding.rate if finding.observed is None else finding.observed),
        Cell(", ".join(f"{name} {number(value)}" for name, value in finding.threshold.items()) or "–"),
        Cell(finding.message, more=f"rows {rows}{', …' if finding.rows[8:] else ''}" if rows else ""),
    ]


# ----------------------------------------------------------------------------------------- cost and lineage


def _cost_section(report: RunReport) -> Section:
    table = stage_table(report.stages, report.cost, report.run.seconds, report.stage_label)
    blocks: list[Block] = []
    if report.cost or report.stages:
        blocks = [cost_terms(report.cost, report.win_rates), table]
    return Section("cost", "Cost", blocks, "brief", "no cost was recorded")


def _lineage_section(report: RunReport) -> Section:
    if not report.model and not any(stage.sha256 for stage in report.stages):
        return Section("lineage", "Lineage", absent="no artifact digests were recorded")
    blocks: list[Block] = [Chain(chain(report))]
    if report.policies:
        blocks.append(_trained_policies(report))
    blocks += [*_registered(report), _artifacts(report)]
    return Section("lineage", "Lineage", blocks, "page")


def _trained_policies(report: RunReport) -> Table:
    columns = [Column(name, "text") for name in ("Method", "Objective", "Starts from", "Reference", "Digest")]
    lines = [
        Line(
            report.label(name),
            [
                Cell(about.method),
                Cell(about.words if about.objective else "–"),
                Cell(about.start),
                Cell(about.reference),
                _digest(report.models[name].sha256 if name in report.models else None),
            ],
        )
        for name, about in report.policies.items()
    ]
    caption = (
        f"The policies that were trained. Registered: {report.label(report.candidate)}. SFT is the run's "
        "reference."
    )
    return Table("Trained policies table", caption, "Policy", columns, lines)


def _digest(sha256: str | None) -> Cell:
    return Cell([Span(sha256, "digest")]) if sha256 else DASH


def _producers(report: RunReport) -> dict[str, str]:
    """The stage of each artifact: the first that made it, because later ones may have the same digest."""
    return {stage.sha256: report.stage_label(stage.name) for stage in reversed(report.stages) if stage.sha256}


def _made_by(digest: str, producers: Mapping[str, str]) -> Span:
    known = producers.get(digest)
    return Span(known, href=f"#made-{digest[:16]}") if known else Span(digest, "digest")


def _registered(report: RunReport) -> list[Block]:
    model = report.model
    if model is None:
        return []
    words = f"Registered: {model.name}"
    words += f" version {model.version}" if model.version else ""
    words += ", registered by an earlier run" if model.known else ""
    words += f", alias {model.alias}" if model.alias else ""
    parts = [Span(f"{words}, digest "), Span(model.sha256, "digest")]
    if model.sha256 in (producers := _producers(report)):
        parts += [Span(" from "), _made_by(model.sha256, producers)]
    blocks: list[Block] = [Paragraph([*parts, Span(", at "), *place(model.uri)], small=False)]
    if folder := path_of(model.uri):
        lines = [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            f'folder = "{folder}"',
            "model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), "
            "AutoTokenizer.from_pretrained(folder)",
        ]
        if is_denoiser(folder):
            lines = [
                "from pathlib import Path",
                "from dpo_core.models.denoiser import load_denoiser",
                f'model = load_denoiser(Path("{folder}"))',
                'pixels = model.sample(["a photo of a circle"], steps=20, guidance=2.0, seeds=[0])',
            ]
        blocks.append(Code("Load the model", "\n".join(lines)))
    return blocks


def _artifacts(report: RunReport) -> Table:
    producers = _producers(report)
    columns = [Column("Digest", "text"), Column("Made from", "long"), Column("Where", "long"),
               Column("MLflow run", "text")]  # fmt: skip
    lines, seen = [], set()
    for stage in report.stages:
        if not stage.sha256:
            continue
        parents = [span for digest in stage.parents for span in (Span(", "), _made_by(digest, producers))]
        key = "" if stage.sha256 in seen else f"made-{stage.sha256[:16]}"
        seen.add(stage.sha256)
        cells = [
            _digest(stage.sha256),
            Cell(parents[1:] or "–"),
            Cell(place(stage.uri)) if stage.uri else DASH,
            _digest(stage.mlflow_run_id),
        ]
        lines.append(Line(report.stage_label(stage.name), cells, key=key))
    caption = "Digests are SHA-256, shortened on screen: one click selects the full digest."
    return Table("Lineage table", caption, "Stage", columns, lines)
