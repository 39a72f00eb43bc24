"""The tables of a study's report, each in a section of its own."""

from collections.abc import Sequence

from dpo_core.statistics.format import duration, number, percent, scaled
from dpo_core.study import AtKl, SettingRow, Study, StudySummary
from tasks.recipe.policies import REFERENCE
from tasks.reports.document import DASH, Cell, Column, Line, Section, Table, cell


def study_tables(study: Study, summary: StudySummary) -> list[Section]:
    """All tables that have rows, the most important first."""
    every = [
        _policies(summary),
        _differences(study, summary),
        _suites(summary),
        _settings(study, summary),
        _compute(study, summary),
        _diversity(study, summary),
        _best_of(summary),
    ]
    return [section for section in every if section]


def measured_on(study: Study, summary: StudySummary) -> str:
    """A sentence on the numbers of prompts, samples and seeds, and on how intervals are computed."""
    seeds = f"{len(summary.seeds)} seed{'' if len(summary.seeds) == 1 else 's'}"
    named = f" ({', '.join(map(str, summary.seeds))})" if summary.seeds else ""
    return (
        f"{study.prompts:,} held-out prompts, {study.samples_per_prompt} sample"
        f"{'' if study.samples_per_prompt == 1 else 's'} of each policy for each; {seeds}{named}. Intervals "
        f"are at 95%, from {summary.resamples:,} resamples of prompts and of the seeds of a point, the "
        "same for all policies; with one seed they resample prompts only."
    )


def _section(
    key: str,
    title: str,
    caption: str,
    columns: Sequence[Column | str],
    lines: list[Line],
    brief: bool = False,
) -> Section | None:
    """A section of one table; None if it has no lines."""
    named = [column if isinstance(column, Column) else Column(column) for column in columns]
    table = Table(f"{title} table", caption, "Policy", named, lines)
    return Section(key, title, [table], "brief" if brief else "text") if lines else None


def _policies(summary: StudySummary) -> Section | None:
    """The policies' envelopes: largest KL, mean gain and reward at fixed KLs."""
    lines = [
        Line(
            row.policy,
            [
                Cell(str(row.settings)),
                Cell(str(row.fewest_seeds)),
                cell(row.reach),
                cell(row.area, "gap"),
                *(_at_kl(at) for at in row.at_kl),
            ],
        )
        for row in summary.policies
    ]
    end = f"{summary.kl_end:g}"
    caption = (
        "Envelopes through the points' means. Mean gain: the area between the envelope and the reference's "
        f"reward from 0 to {end} nats, divided by {end}. Seeds: of the point with fewest. *: beyond the "
        "policy's largest KL, where its envelope is flat."
    )
    columns = ["Points", "Seeds", "Farthest KL", f"Mean gain to {end} nats"]
    columns += [f"Reward at {kl:g} nats" for kl in summary.kl_at]
    return _section("policies", "Policies", caption, columns, lines, brief=True)


_SETTING_COLUMNS = [
    Column("Point", "text"), Column("Seeds", brief=False), Column("Reward", brief=False),
    Column("Reward by seed", brief=False), Column("Gain"), Column("KL (k1)"), Column("KL (k3)", brief=False),
    Column("Entropy"), Column("distinct-2", brief=False), Column("Length", brief=False), Column("FLOPs"),
    Column("Time", brief=False), Column("Peak memory", brief=False), Column("Shared stages", brief=False),
]  # fmt: skip


def _settings(study: Study, summary: StudySummary) -> Section | None:
    """All settings, the reference first."""
    measured = {
        "Point": Cell("reference"),
        "Reward": cell(summary.reference),
        "Entropy": cell(study.reference_entropy),
        "distinct-2": cell(study.reference_distinct_2),
        "Length": cell(study.reference_length),
    }
    reference = [measured.get(column.name, DASH) for column in _SETTING_COLUMNS]
    lines = [Line(REFERENCE, reference), *(Line(row.policy, _setting(row)) for row in summary.settings)]
    caption = (
        "Means over the seeds. Gain: over SFT on the same prompts. KL: nats per sequence. FLOPs, time and "
        "memory: the whole pipeline after SFT; shared stages are part of it, counted in full for each policy."
    )
    return _section("points", "Points", caption, _SETTING_COLUMNS, lines, brief=True)


def _setting(row: SettingRow) -> list[Cell]:
    """The cells of `_SETTING_COLUMNS`."""
    memory = row.cost.peak_memory_bytes
    shared = ", ".join(f"{stage} {scaled(flops, 'FLOP')}" for stage, flops in row.shared_cost.items())
    return [
        Cell(row.setting),
        Cell(str(len(row.seeds))),
        cell(row.reward),
        Cell(f"{number(row.seed_rewards.low)} to {number(row.seed_rewards.high)}"),
        cell(row.gain, "gap"),
        cell(row.kl),
        cell(row.kl_k3),
        cell(row.entropy),
        cell(row.distinct_2),
        cell(row.length),
        Cell(scaled(row.cost.flops, "FLOP")),
        Cell(duration(row.cost.seconds)),
        DASH if memory is None else Cell(scaled(memory, "B", 1024)),
        Cell(shared or "–"),
    ]


def _differences(study: Study, summary: StudySummary) -> Section | None:
    base = study.base
    others = [policy for policy in study.drawn_policies() if policy != base]
    differences = [row for policy in others if (row := summary.difference(base, policy))]
    lines = [
        Line(
            f"{row.policy} − {row.other}",
            [
                cell(row.area, "gap"),
                cell(row.common_kl),
                cell(row.common_area, "gap"),
                *(_at_kl(at, "gap") for at in row.at_kl),
            ],
        )
        for row in differences
    ]
    columns = [f"Mean gain to {summary.kl_end:g} nats", "Farthest common KL", "Mean gain to there"]
    columns += [f"Reward at {kl:g} nats" for kl in summary.kl_at]
    caption = (
        "Paired on the same prompts and seeds. The intervals at fixed KLs hold together (Bonferroni over "
        f"{len(summary.kl_at)}). *: beyond the largest KL of one of the two."
    )
    return _section("differences", f"{base} against the others", caption, columns, lines)


def _suites(summary: StudySummary) -> Section | None:
    """Each policy's score on each suite, at the setting that its reward on other prompts chose."""
    lines = [
        Line(
            row.policy,
            [
                cell(row.score),
                cell(row.gain, "gap"),
                Cell(f"{row.seed_gains.low:+.3f} to {row.seed_gains.high:+.3f}"),
                Cell(str(row.seed_gains.seeds)),
            ],
            hint=row.setting,
            group=row.suite,
        )
        for row in summary.suites
    ]
    caption = (
        "Each policy at the setting with the best reward on the study's own held-out prompts, which are not "
        "those of the suites. Intervals resample items and seeds."
    )
    if any("/" in row.suite for row in summary.suites):
        caption += " SUITE/held_out: its prompts whose content no training prompt has."
    columns = ["Score", "Gain over the reference", "Gain by seed", "Seeds"]
    return _section("suites", "Suites", caption, columns, lines)


def _compute(study: Study, summary: StudySummary) -> Section | None:
    lines = [
        Line(
            f"{row.policy} / {row.other}",
            [
                cell(row.gain_share, "share"),
                cell(row.reward),
                DASH if row.flops is None else Cell(scaled(row.flops, "FLOP")),
                DASH if row.other_flops is None else Cell(scaled(row.other_flops, "FLOP")),
                cell(row.ratio),
                Cell(percent(row.defined)),
            ],
        )
        for row in summary.compute
        if row.other in study.drawn_policies()
    ]
    columns = ["Share of gain", "Reward", "First", "Second", "Ratio", "Defined in"]
    caption = (
        "The fewest FLOPs with which each policy reaches the same reward, a share of the largest gain that "
        "both reach. Defined in: share of resamples in which both policies gain."
    )
    return _section("compute-ratio", "Compute for the same reward", caption, columns, lines)


def _diversity(study: Study, summary: StudySummary) -> Section | None:
    metrics = {"entropy": "Entropy", "distinct_1": "distinct-1", "distinct_2": "distinct-2"}
    by_setting: dict[tuple[str, str], dict[str, Cell]] = {}
    for row in summary.diversity:
        if row.policy in study.drawn_policies():
            part = row.relative
            cells = by_setting.setdefault((row.policy, row.setting), {"seeds": Cell(str(part.seeds))})
            between = f"{part.low:+.1%} to {part.high:+.1%}" if part.seeds > 1 else ""
            cells[row.metric] = Cell(f"{part.value:+.1%}", between)
    lines = [
        Line(policy, [Cell(setting), cells["seeds"], *(cells.get(name, DASH) for name in metrics)])
        for (policy, setting), cells in by_setting.items()
    ]
    caption = f"Relative to {study.base} at the same point, paired by seed. Below: the range over the seeds."
    columns: list[Column | str] = [Column("Point", "text"), "Seeds", *metrics.values()]
    return _section("diversity", f"Diversity against {study.base}", caption, columns, lines)


def _best_of(summary: StudySummary) -> Section | None:
    lines = [
        Line(f"best of {row.n}", [cell(row.kl_bound), cell(row.reward), cell(row.gain, "gap")])
        for row in summary.best_of
    ]
    caption = "The best of n samples of SFT by the known reward: what selection reaches without training."
    return _section("best-of", "Best of n", caption, ["KL at most", "Reward", "Gain"], lines)


def _at_kl(at: AtKl, kind: str = "number") -> Cell:
    shown = cell(at.reward, "gap" if kind == "gap" else "number")
    return shown if at.reached else shown._replace(value=f"{shown.value}*")
