"""The tables of a study's report, shared by the page, Markdown and the terminal."""

from collections.abc import Sequence
from typing import NamedTuple

from dpo_core.statistics.estimates import Estimate
from dpo_core.study import AtKl, Claim, SettingRow, Study, StudySummary
from tasks.recipe.policies import REFERENCE
from tasks.reports.format import Cell, duration, number, percent, scaled

VERDICT_KIND = {
    "supported": "good", "contradicted": "bad", "undecided": "unclear", "not measured": "plain",
}  # fmt: skip


class Table(NamedTuple):
    """A table: the first `labels` columns are text that identifies the row, the others are numbers."""

    key: str
    title: str
    caption: str
    head: list[str]
    rows: list[list[Cell]]
    labels: int


def tables(study: Study, summary: StudySummary) -> list[Table]:
    """All tables that have rows, the most important first."""
    every = [
        policies_table(summary),
        _differences(study, summary),
        settings_table(study, summary),
        _compute(study, summary),
        _diversity(study, summary),
        _best_of(summary),
    ]
    return [table for table in every if table.rows]


def claims_rows(claims: Sequence[Claim]) -> list[list[str]]:
    """Rows of the claims table: claim, claimed value, measured value, verdict."""
    return [[claim.claim, claim.claimed, claim.found, claim.verdict] for claim in claims]


CLAIMS_HEAD = ["Claim", "Claimed", "Found", "Verdict"]


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


def policies_table(summary: StudySummary) -> Table:
    """The policies' envelopes: largest KL, mean gain and reward at fixed KLs."""
    head = ["Policy", "Points", "Seeds", "Farthest KL", f"Mean gain to {summary.kl_end:g} nats"]
    rows = [
        [
            Cell(row.policy),
            Cell(str(row.settings)),
            Cell(str(row.fewest_seeds)),
            Cell(number(row.reach)),
            _estimate(row.area, signed=True),
            *(_at_kl(at, signed=False) for at in row.at_kl),
        ]
        for row in summary.policies
    ]
    caption = (
        "Envelopes through the points' means. Mean gain: the area between the envelope and the reference's "
        f"reward from 0 to {summary.kl_end:g} nats, divided by {summary.kl_end:g}. Seeds: of the point with "
        "fewest. *: beyond the policy's largest KL, where its envelope is flat."
    )
    head += [f"Reward at {kl:g} nats" for kl in summary.kl_at]
    return Table("policies", "Policies", caption, head, rows, 1)


def settings_table(study: Study, summary: StudySummary, brief: bool = False) -> Table:
    """All settings, the reference first; `brief` has only the columns that fit in 80 characters."""
    head = ["Policy", "Point", "Gain", "KL (k1)", "Entropy", "FLOPs"]
    if not brief:
        head = [
            "Policy", "Point", "Seeds", "Reward", "Reward by seed", "Gain", "KL (k1)", "KL (k3)", "Entropy",
            "distinct-2", "Length", "FLOPs", "Time", "Peak memory", "Shared stages",
        ]  # fmt: skip
    rows = [_reference_cells(study, summary), *(_setting_cells(row) for row in summary.settings)]
    caption = (
        "Means over the seeds. Gain: over SFT on the same prompts. KL: nats per sequence. FLOPs, time and "
        "memory: the whole pipeline after SFT; shared stages are part of it, counted in full for each policy."
    )
    return Table("points", "Points", caption, head, [[row[name] for name in head] for row in rows], 2)


def _reference_cells(study: Study, summary: StudySummary) -> dict[str, Cell]:
    none = Cell("–")
    cells = dict.fromkeys(("Seeds", "Reward by seed", "Gain", "KL (k1)", "KL (k3)"), none)
    return cells | {
        "Policy": Cell(REFERENCE),
        "Point": Cell("reference"),
        "Reward": _estimate(summary.reference),
        "Entropy": Cell(number(study.reference_entropy)),
        "distinct-2": Cell(number(study.reference_distinct_2)),
        "Length": none if study.reference_length is None else Cell(number(study.reference_length)),
        "FLOPs": none,
        "Time": none,
        "Peak memory": none,
        "Shared stages": none,
    }


def _setting_cells(row: SettingRow) -> dict[str, Cell]:
    memory = row.cost.peak_memory_bytes
    shared = ", ".join(f"{stage} {scaled(flops, 'FLOP')}" for stage, flops in row.shared_cost.items())
    return {
        "Policy": Cell(row.policy),
        "Point": Cell(row.setting),
        "Seeds": Cell(str(len(row.seeds))),
        "Reward": _estimate(row.reward),
        "Reward by seed": Cell(f"{number(row.seed_rewards.low)} to {number(row.seed_rewards.high)}"),
        "Gain": _estimate(row.gain, signed=True),
        "KL (k1)": _estimate(row.kl),
        "KL (k3)": _estimate(row.kl_k3),
        "Entropy": Cell(number(row.entropy)),
        "distinct-2": Cell(number(row.distinct_2)),
        "Length": Cell(number(row.length)),
        "FLOPs": Cell(scaled(row.cost.flops, "FLOP")),
        "Time": Cell(duration(row.cost.seconds)),
        "Peak memory": Cell("–" if memory is None else scaled(memory, "B", 1024)),
        "Shared stages": Cell(shared or "–"),
    }


def _differences(study: Study, summary: StudySummary) -> Table:
    drawn = study.drawn_policies()
    base = study.base
    differences = [summary.difference(base, policy) for policy in drawn if policy != base]
    end = f"{summary.kl_end:g}"
    head = ["Policies", f"Mean gain to {end} nats", "Farthest common KL", "Mean gain to there"]
    rows = [
        [
            Cell(f"{row.policy} − {row.other}"),
            _estimate(row.area, signed=True),
            Cell(number(row.common_kl)),
            _estimate(row.common_area, signed=True) if row.common_area else Cell("–"),
            *(_at_kl(at, signed=True) for at in row.at_kl),
        ]
        for row in differences
        if row
    ]
    head += [f"Reward at {kl:g} nats" for kl in summary.kl_at]
    caption = (
        "Paired on the same prompts and seeds. The intervals at fixed KLs hold together (Bonferroni over "
        f"{len(summary.kl_at)}). *: beyond the largest KL of one of the two."
    )
    return Table("differences", f"{base} against the others", caption, head, rows, 1)


def _compute(study: Study, summary: StudySummary) -> Table:
    rows = [
        [
            Cell(f"{row.policy} / {row.other}"),
            Cell(percent(row.gain_share)),
            Cell("–" if row.reward is None else number(row.reward)),
            Cell("–" if row.flops is None else scaled(row.flops, "FLOP")),
            Cell("–" if row.other_flops is None else scaled(row.other_flops, "FLOP")),
            _estimate(row.ratio) if row.ratio else Cell("–"),
            Cell(percent(row.defined)),
        ]
        for row in summary.compute
        if row.other in study.drawn_policies()
    ]
    head = ["Policies", "Share of gain", "Reward", "First", "Second", "Ratio", "Defined in"]
    caption = (
        "The fewest FLOPs with which each policy reaches the same reward, a share of the largest gain that "
        "both reach. Defined in: share of resamples in which both policies gain."
    )
    return Table("compute-ratio", "Compute for the same reward", caption, head, rows, 1)


def _diversity(study: Study, summary: StudySummary) -> Table:
    metrics = {"entropy": "Entropy", "distinct_1": "distinct-1", "distinct_2": "distinct-2"}
    by_setting: dict[tuple[str, str], dict[str, Cell]] = {}
    for row in summary.diversity:
        if row.policy not in study.drawn_policies():
            continue
        part = row.relative
        cells = by_setting.setdefault((row.policy, row.setting), {"Seeds": Cell(str(part.seeds))})
        between = f"{part.low:+.1%} to {part.high:+.1%}" if part.seeds > 1 else ""
        cells[metrics[row.metric]] = Cell(f"{part.value:+.1%}", between)
    head = ["Seeds", *metrics.values()]
    rows = [
        [Cell(policy), Cell(setting), *(cells.get(name, Cell("–")) for name in head)]
        for (policy, setting), cells in by_setting.items()
    ]
    caption = f"Relative to {study.base} at the same point, paired by seed. Below: the range over the seeds."
    return Table("diversity", f"Diversity against {study.base}", caption, ["Policy", "Point", *head], rows, 2)


def _best_of(summary: StudySummary) -> Table:
    rows = [
        [
            Cell(f"best of {row.n}"),
            Cell(number(row.kl_bound)),
            _estimate(row.reward),
            _estimate(row.gain, signed=True),
        ]
        for row in summary.best_of
    ]
    caption = "The best of n samples of SFT by the known reward: what selection reaches without training."
    return Table("best-of", "Best of n", caption, ["Policy", "KL at most", "Reward", "Gain"], rows, 1)


def _at_kl(at: AtKl, signed: bool) -> Cell:
    cell = _estimate(at.reward, signed)
    return cell if at.reached else cell._replace(value=cell.value + "*")


def _estimate(estimate: Estimate, signed: bool = False) -> Cell:
    widest = max(abs(estimate.low), abs(estimate.high))
    low, high = (number(value, signed, widest) for value in (estimate.low, estimate.high))
    return Cell(number(estimate.value, signed, widest), f"{low} to {high}", estimate.n)
