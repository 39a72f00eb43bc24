"""Sections that the reports of runs and evaluations share: win rates, suites, comparisons, samples, cost."""

from collections.abc import Callable, Mapping, Sequence

from dpo_core.evaluation.compare import Comparison, ComparisonRow
from dpo_core.evaluation.results import Measure
from dpo_core.judging.results import WinRate
from dpo_core.statistics.estimates import Estimate
from dpo_core.statistics.format import Kind, duration, interval, number, p_value, percent, scaled
from tasks.reports.document import (
    DASH,
    Block,
    Cell,
    Code,
    Column,
    Fold,
    Line,
    Paragraph,
    Sample,
    Samples,
    Section,
    Span,
    Subheading,
    Table,
    Terms,
    Tone,
    cell,
)
from tasks.reports.run_report import RunCost, RunInfo, StageRow, SuiteRow

MAX_SAMPLES = 12
Label = Callable[[str], str]
"""The displayed name of a policy or model."""

_TOO_FEW = Cell("–", more="too few to tell")
_DIRECTION = {"higher": "", "lower": "lower is better", "neither": "neither direction is better"}
_FINDINGS = {
    "better": Cell("▲ better", tone="good"),
    "worse": Cell("▼ worse", tone="bad"),
    "undecided": Cell("○ undecided", tone="plain"),
}
_GLOSSARY = {
    "suite": "A fixed set of test items with a metric, such as GSM8K.",
    "policy": "A language model that is trained; on this page also the reference (SFT) it started from.",
    "gain": "The mean reward of a policy minus the reference's, on the same prompts.",
    "proxy": "A reward model that stands for what people prefer; a policy can exploit its errors.",
    "implicit reward": "β times the difference of an answer's log-probability under policy and reference.",
    "margin": "The chosen answer's implicit reward, or log-probability, minus the rejected one's.",
    "KL": "The distance of a policy from its reference, over the policy's own answers.",
    "nats": "The unit of log-probabilities, entropy and KL, from the natural logarithm: 1 nat is 1.44 bits.",
}


def measured_sections(
    win_rates: Sequence[WinRate],
    suites: Sequence[SuiteRow],
    comparisons: Sequence[Comparison],
    label: Label,
    undecided_brief: bool,
) -> list[Section]:
    """Win rates, suites and comparisons.

    Args:
        undecided_brief: whether the terminal lists undecided differences; they are always counted.
    """
    rates = [win_rate_table(win_rates, label)] if win_rates else []
    tables = suite_tables(suites, label) if suites else []
    folded = [Fold(table.name, [table]) for table in tables[1:]]
    compared = _comparison_blocks(comparisons, suites, label, undecided_brief) if comparisons else []
    untried = "no two models were compared on a suite"
    return [
        Section("win-rates", "Win rates", rates, "brief", "no judge compared answers"),
        Section("suites", "Tasks", [*tables[:1], *folded], "brief", "no suite was run"),
        Section("comparisons", "Comparisons", compared, "brief", untried),
    ]


# --------------------------------------------------------------------------------------------------- suites


def suite_tables(suites: Sequence[SuiteRow], label: Label) -> list[Table]:
    """One line per measure, one cell per model: over all items, then each suite's subsets."""
    policies = list(dict.fromkeys(row.policy for row in suites))
    columns = [Column(label(policy)) for policy in policies]
    lines: list[Line] = []
    subsets: dict[str, list[Line]] = {}
    for suite in dict.fromkeys(row.suite for row in suites):
        rows = [row for row in suites if row.suite == suite]
        title = rows[0].title
        measures = {(row.policy, m.subset, m.name): m for row in rows for m in row.measures}
        for subset, name in dict.fromkeys(key[1:] for key in measures):
            own = {p: measures[p, subset, name] for p in policies if (p, subset, name) in measures}
            measure = next(iter(own.values()))
            cells = [_suite_cell(own.get(policy)) for policy in policies]
            hint = _joined(measure.unit, _DIRECTION[measure.better])
            if subset:
                subsets.setdefault(title, []).append(Line(subset, cells, _joined(measure.label, hint)))
            else:
                prompts = Cell(_range({m.estimate.n for m in own.values()}))
                main = not any(line.group == title for line in lines)
                known = _contaminated(rows) if main else ""
                lines.append(Line(measure.label, [*cells, prompts], _joined(hint, known), title, main))
    caption = (
        "The main measure of each suite is bold; higher is better unless stated otherwise. Clean: without "
        "items that are also in the training data. Intervals are at 95%."
    )
    tables = [Table("Table of tasks", caption, "Task", [*columns, Column("Prompts")], lines, wide=True)]
    return tables + [
        Table(f"{title} by subset", "With 95% intervals.", "Subset", columns, lines, wide=True)
        for title, lines in subsets.items()
    ]


def main_measures(suites: Sequence[SuiteRow]) -> list[str]:
    """The first measure of each suite in words: `MMLU (Accuracy) 33.1% [30.7% to 35.5%]`."""
    shown = []
    for row in suites:
        measure = next((m for m in row.measures if not m.subset), None)
        if measure:
            shown.append(f"{row.title} ({measure.label}) {interval(measure.estimate, _kind(measure))}")
    return shown


def _suite_cell(measure: Measure | None) -> Cell:
    if measure is None:
        return DASH
    clean = f"{interval(measure.clean, _kind(measure)).value} clean" if measure.clean else ""
    return cell(measure.estimate, _kind(measure), clean)


def _contaminated(rows: Sequence[SuiteRow]) -> str:
    items = _range({row.contaminated for row in rows})
    return "" if items == "0" else f"{items} items in training"


def _kind(measure: Measure | ComparisonRow) -> Kind:
    return "share" if measure.kind == "share" else "number"


def _range(counts: set[int]) -> str:
    """1,319, or 1,200 to 1,319 if models differ."""
    return " to ".join(f"{count:,}" for count in sorted({min(counts), max(counts)}))


def _joined(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


# ---------------------------------------------------------------------------------------------- comparisons


def outcome(comparison: Comparison) -> str:
    """The counts of a comparison: "2 better, 1 worse, 5 undecided"."""
    tested = [row.finding for row in comparison.rows if row.p_holm is not None]
    if not tested:
        return "nothing was tested"
    return ", ".join(f"{tested.count(name)} {name}" for name in ("better", "worse", "undecided"))


def _comparison_blocks(
    comparisons: Sequence[Comparison], suites: Sequence[SuiteRow], label: Label, undecided_brief: bool
) -> list[Block]:
    titles = {row.suite: row.title for row in suites}
    blocks: list[Block] = [
        Paragraph(
            "Candidate minus baseline on the items that both answered, resampled by prompt. ▲ better and "
            "▼ worse: at 5% after Holm's correction over all differences that were tested together; "
            "○ undecided; pp: percentage points. Intervals are at 95%; the page draws them around no "
            "difference."
        )
    ]
    for comparison in comparisons:
        names = f"{label(comparison.candidate)} against {label(comparison.baseline)}"
        tested: list[Line] = []
        untested: list[Line] = []
        for row in comparison.rows:
            line = _comparison_line(row, comparison, titles)
            brief = undecided_brief or row.finding != "undecided"
            (untested if row.p_holm is None else tested).append(line._replace(brief=brief))
        blocks.append(Subheading(f"{names}: {outcome(comparison)}"))
        if tested:
            blocks.append(_comparison_table(f"{names}: tested", tested))
        if untested:
            table = _comparison_table(f"{names}: untested differences", untested)
            blocks.append(Fold(f"{len(untested)} untested differences", [table]))
        if comparison.left_out:
            blocks.append(Paragraph(f"Not compared: {'; '.join(comparison.left_out)}."))
    return blocks


def _comparison_table(name: str, lines: list[Line]) -> Table:
    columns = [
        Column("Finding", "text"), Column("Difference"), Column("Candidate", brief=False),
        Column("Baseline", brief=False), Column("p", brief=False), Column("p (Holm)"),
    ]  # fmt: skip
    return Table(name, "", "Task", columns, lines, wide=True)


def _comparison_line(row: ComparisonRow, comparison: Comparison, titles: Mapping[str, str]) -> Line:
    name = " · ".join(part for part in (titles.get(row.suite, row.suite), row.subset) if part)
    alike = [other.difference for other in comparison.rows if _unit(other) == _unit(row)]
    kind = _kind(row)
    finding = Cell("– not tested", tone="plain") if row.p_holm is None else _FINDINGS[row.finding]
    difference = cell(row.difference, "points" if kind == "share" else "gap")
    cells = [
        finding,
        difference._replace(tone=finding.tone, bar=_bar(row.difference, 0, alike)),
        cell(row.candidate, kind),
        cell(row.baseline, kind),
        Cell(p_value(row.p), more=row.test),
        DASH if row.p_holm is None else Cell(p_value(row.p_holm)),
    ]
    return Line(name, cells, _joined(row.label, row.unit, _DIRECTION[row.better]))


def _unit(row: ComparisonRow) -> str:
    """Differences of the same unit are drawn on the same scale."""
    return "share" if row.kind == "share" else row.unit or row.label


def _bar(estimate: Estimate, nothing: float, alike: Sequence[Estimate]) -> list[float]:
    """`Cell.bar` on a scale from the least to the greatest end of all alike, `nothing` included."""
    ends = [nothing, *(end for one in alike for end in (one.low, one.value, one.high))]
    least, width = min(ends), max(ends) - min(ends) or 1.0
    shown = (nothing, estimate.low, estimate.value, estimate.high)
    return [round(100 * (end - least) / width, 1) for end in shown]


# ------------------------------------------------------------------------------------------------ win rates


def win_rate_table(rates: Sequence[WinRate], label: Label) -> Table:
    """One line per win rate."""
    caption = (
        "A tie counts half. At equal length: the length-controlled win rate (Dubois et al. 2024); none if "
        "length and quality cannot be separated. Consistency: the share of verdicts that do not change when "
        "the answers are swapped. Mean length in characters, first / second. Intervals are at 95%; the page "
        "draws them around 50%."
    )
    columns = [
        Column("Win rate"), Column("At equal length"), Column("Win / tie / loss"),
        Column("Consistency", brief=False), Column("Mean length", brief=False),
        Column("Judge's cost", brief=False),
    ]  # fmt: skip
    alike = [e for rate in rates for e in (rate.rate, rate.length_controlled) if e]
    lines = [
        Line(f"{label(r.a)} vs {label(r.b)}", _win_rate_cells(r, alike), f"judge: {r.judge}") for r in rates
    ]
    return Table("Win rate table", caption, "Compared", columns, lines, wide=True)


def _win_rate_cells(rate: WinRate, alike: Sequence[Estimate]) -> list[Cell]:
    adjusted = rate.length_controlled
    tone: Tone = "good" if rate.rate.low > 0.5 else "bad" if rate.rate.high < 0.5 else "plain"
    asked = [(rate.requests, "requests"), (rate.cached, "cached")]
    return [
        cell(rate.rate, "share")._replace(tone=tone, bar=_bar(rate.rate, 0.5, alike)),
        cell(adjusted, "share")._replace(bar=_bar(adjusted, 0.5, alike)) if adjusted else _TOO_FEW,
        Cell(
            f"{rate.wins:,} / {rate.ties:,} / {rate.losses:,}",
            more=f"{rate.unjudged:,} unjudged" if rate.unjudged else "",
        ),
        cell(rate.position_consistency, "share"),
        Cell(f"{number(rate.length_a)} / {number(rate.length_b)}"),
        Cell(
            "–" if rate.cost is None else f"{rate.cost:,.2f}",
            more=", ".join(f"{count:,} {word}" for count, word in asked if count),
        ),
    ]


# ------------------------------------------------------------------------- samples, cost, stages, reproduce


def samples_section(samples: Sequence[Sample], label: Label) -> Section:
    """Two prompts with all answers, and the others folded."""
    shown = [
        sample.model_copy(
            update={
                "completions": {label(name): text for name, text in sample.completions.items()},
                "rewards": {label(name): value for name, value in sample.rewards.items()},
                "images": {label(name): files for name, files in sample.images.items()},
            }
        )
        for sample in samples[:MAX_SAMPLES]
    ]
    words = "The same prompt answered by each model"
    if any(sample.chosen for sample in shown):
        words += ", beside the data's own answer"
    if len(samples) > MAX_SAMPLES:
        words += f"; {MAX_SAMPLES} of {len(samples)} recorded prompts, the first ones"
    words += ". Written by models: may be wrong or offensive."
    blocks: list[Block] = [Paragraph(words), Samples(shown[:2])] if shown else []
    if more := shown[2:]:
        blocks.append(Fold(f"{len(more)} more prompt{'s' if len(more) > 1 else ''}", [Samples(more, 3)]))
    return Section("samples", "Samples", blocks, "page", "no completions were recorded")


def cost_terms(cost: RunCost | None, win_rates: Sequence[WinRate] = ()) -> Terms:
    """Time, tokens, compute, memory, and cost of the judges, as far as recorded."""
    facts = []
    if cost:
        facts = [
            ("Wall-clock time", Cell(duration(cost.seconds))),
            ("Tokens trained", Cell(scaled(cost.tokens_trained, ""))),
        ]
        if cost.flops is not None:
            facts.append(("Compute", Cell(scaled(cost.flops, "FLOP"))))
        if cost.peak_memory_bytes is not None:
            facts.append(("Peak memory", Cell(scaled(cost.peak_memory_bytes, "B", 1024))))
    paid = [rate.cost for rate in win_rates if rate.cost is not None]
    requests, cached = sum(rate.requests for rate in win_rates), sum(rate.cached for rate in win_rates)
    if paid or requests:
        price = f"{sum(paid):,.2f}" if paid else "no price set"
        facts.append(("Judge", Cell(price, more=f"{requests:,} requests, {cached:,} cached")))
    return Terms(facts, "facts")


def stage_table(stages: Sequence[StageRow], cost: RunCost | None, seconds: float, name: Label = str) -> Table:
    """The stages with their time and artifact; `name` gives the displayed name of a stage."""
    spent, total = cost.seconds_by_stage if cost else {}, cost.seconds if cost else seconds
    lines = [
        Line(
            name(stage.name),
            [
                Cell(stage.state),
                Cell(duration(stage.seconds)),
                Cell(percent(spent.get(stage.name, stage.seconds) / total) if total > 0 else "–"),
                Cell(stage.kind or "–"),
                Cell(stage_size(stage)),
            ],
        )
        for stage in stages
    ]
    columns = [
        Column("State", "text"), Column("Time"), Column("Share of cost", brief=False),
        Column("Kind", "text", brief=False), Column("Artifact"),
    ]  # fmt: skip
    caption = "A cached stage was not run again: its artifact was verified against its digest and reused."
    return Table("Stage table", caption, "Stage", columns, lines)


def stage_size(stage: StageRow) -> str:
    """The size of the artifact: "1,200 rows", "134,515,008 parameters", or an en dash."""
    sizes = [(stage.rows, "rows"), (stage.parameters, "parameters")]
    return ", ".join(f"{count:,} {unit}" for count, unit in sizes if count is not None) or "–"


def reproduce_section(run: RunInfo, notes: dict[str, object], recipe_text: str = "") -> Section:
    """The command that reproduces a run, and its environment."""
    started = f"{run.started_at:%Y-%m-%d %H:%M:%S %Z}".strip()
    listed: list[tuple[str, object, str]] = [
        ("In the folder", run.folder, "code"),
        ("Started by", run.started_by, "code"),
        ("Commit", run.git_commit, "code"),
        ("Started", f"{started}, {duration(run.seconds)}", ""),
        ("MLflow run", run.mlflow_run_id, "code"),
        ("Tracking", run.tracking_uri, "place"),
        ("Hardware", run.hardware, ""),
        ("Software", f"Python {run.python}, {run.platform}", ""),
        *((name, value, "") for name, value in notes.items()),
    ]
    terms = [(name, Cell(_words(str(value), kind))) for name, value, kind in listed if value]
    blocks: list[Block] = [Code("Command", run.command), Terms(terms)]
    if recipe_text:
        blocks.append(
            Fold("The resolved recipe, recipe.yaml beside this page", [Code("Recipe", recipe_text)])
        )
    return Section("reproduce", "Reproduce", blocks)


def _words(text: str, kind: str) -> str | list[Span]:
    return place(text) if kind == "place" else [Span(text, "code")] if kind == "code" else text


def place(uri: str) -> list[Span]:
    """An address as code; the page links it if that is safe."""
    return [Span(uri, "code", uri)]


def glossary_section() -> Section:
    """The page's terms, folded."""
    terms = Terms([(name, Cell(meaning)) for name, meaning in _GLOSSARY.items()])
    return Section("words", "Words", [Fold("Words on this page", [terms])], "page")
