"""What suites, comparisons, judges and the rule of promotion leave, in synthetic numbers."""

from typing import Any, NamedTuple

from dpo_core.evaluation.compare import Comparison, ComparisonRow
from dpo_core.evaluation.decision import Decision, Reason
from dpo_core.evaluation.results import Better, Kind, Measure
from dpo_core.judging.results import WinRate
from dpo_core.statistics.estimates import Estimate
from tasks.reports.run_report import SuiteRow

POLICIES = ("SFT", "DPO", "PPO", "champion")


class Spec(NamedTuple):
    """One measure of a made-up suite: its values by policy, in the order of `POLICIES`."""

    suite: str
    title: str
    items: int
    contaminated: int
    name: str
    label: str
    values: tuple[float, float, float, float]
    half: float
    better: Better = "higher"
    kind: Kind = "share"
    unit: str = ""
    subsets: tuple[str, ...] = ()


SPECS = (
    Spec("rewardbench", "RewardBench", 2985, 0, "accuracy", "Accuracy", (0.612, 0.701, 0.634, 0.688), 0.017,
         subsets=("Chat", "Chat Hard", "Safety", "Reasoning")),
    Spec("mmlu", "MMLU", 1531, 12, "accuracy", "Accuracy", (0.334, 0.331, 0.309, 0.336), 0.024,
         subsets=("humanities", "other", "social sciences", "STEM")),
    Spec("gsm8k", "GSM8K", 1319, 0, "exact_match", "Exact match", (0.058, 0.061, 0.047, 0.052), 0.013),
    Spec("truthfulqa", "TruthfulQA", 817, 0, "mc1", "MC1", (0.242, 0.271, 0.239, 0.265), 0.03),
    Spec("truthfulqa", "TruthfulQA", 817, 0, "mc2", "MC2", (0.391, 0.447, 0.378, 0.44), 0.026),
    Spec("xstest", "XSTest", 450, 0, "over_refusal", "Refused, though safe", (0.044, 0.072, 0.04, 0.068),
         0.031, better="lower"),
    Spec("xstest", "XSTest", 450, 0, "refusal", "Refused, being unsafe", (0.41, 0.735, 0.405, 0.66), 0.069),
    Spec("wikitext", "WikiText-2", 62, 0, "perplexity", "Perplexity", (18.4, 19.6, 23.1, 19.2), 1.1,
         better="lower", kind="mean"),
)  # fmt: skip


def estimate(value: float, half: float, n: int) -> Estimate:
    return Estimate(value=value, low=value - half, high=value + half, n=n)


def _measures(spec: Spec, value: float) -> list[Measure]:
    known: dict[str, Any] = {
        "name": spec.name, "label": spec.label, "better": spec.better, "kind": spec.kind, "unit": spec.unit,
    }  # fmt: skip
    clean = estimate(value - 0.002, spec.half, spec.items - spec.contaminated) if spec.contaminated else None
    overall = Measure(**known, estimate=estimate(value, spec.half, spec.items), clean=clean)
    part = spec.items // max(1, len(spec.subsets))
    return [
        overall,
        *(
            Measure(**known, subset=name, estimate=estimate(value + 0.03 * (i - 1), 2 * spec.half, part))
            for i, name in enumerate(spec.subsets)
        ),
    ]


def make_suites(policies: tuple[str, ...] = POLICIES) -> list[SuiteRow]:
    return [
        SuiteRow(
            suite=suite, title=own[0].title, policy=policy, items=own[0].items,
            contaminated=own[0].contaminated,
            measures=[m for spec in own for m in _measures(spec, spec.values[POLICIES.index(policy)])],
        )
        for suite in dict.fromkeys(spec.suite for spec in SPECS)
        for own in [[spec for spec in SPECS if spec.suite == suite]]
        for policy in policies
    ]  # fmt: skip


def make_comparison(baseline: str) -> Comparison:
    """DPO against one other policy: every measure tested, and two subsets that only inform."""
    rows = []
    for spec in SPECS:
        own, other = spec.values[POLICIES.index("DPO")], spec.values[POLICIES.index(baseline)]
        gap = own - other
        clear = abs(gap) > spec.half
        good = (gap > 0) == (spec.better == "higher")
        rows.append(
            ComparisonRow(
                suite=spec.suite, measure=spec.name, label=spec.label, better=spec.better, kind=spec.kind,
                unit=spec.unit, candidate=estimate(own, spec.half, spec.items),
                baseline=estimate(other, spec.half, spec.items),
                difference=estimate(gap, 0.9 * spec.half, spec.items), items=spec.items,
                test="paired bootstrap" if spec.kind == "mean" else "McNemar",
                p=0.0002 if clear else 0.21, p_holm=0.0016 if clear else 1.0,
                finding=("better" if good else "worse") if clear else "undecided",
            )
        )  # fmt: skip
    informing = [
        rows[0].model_copy(update={"subset": name, "p_holm": None, "finding": "undecided", "items": 700})
        for name in ("Chat Hard", "Safety")
    ]
    return Comparison(
        candidate="DPO", baseline=baseline, rows=[*rows, *informing],
        left_out=["humaneval: running code is switched off"],
    )  # fmt: skip


def make_comparisons() -> list[Comparison]:
    return [make_comparison("SFT"), make_comparison("champion")]


def make_win_rates() -> list[WinRate]:
    judge: dict[str, Any] = {"judge": "qwen3-8b", "cost": 0.42, "requests": 512}
    return [
        WinRate(a="DPO", b="SFT", judge="sentiment", rate=estimate(0.742, 0.041, 256), wins=741, ties=38,
                losses=245, length_a=212.4, length_b=198.1),
        WinRate(a="DPO", b="SFT", rate=estimate(0.683, 0.052, 256), wins=166, ties=17, losses=69, unjudged=4,
                position_consistency=0.871, length_controlled=estimate(0.655, 0.055, 256), length_a=212.4,
                length_b=198.1, **judge),
        WinRate(a="DPO", b="champion", rate=estimate(0.521, 0.055, 256), wins=112, ties=44, losses=100,
                position_consistency=0.803, length_controlled=estimate(0.517, 0.057, 256), length_a=212.4,
                length_b=209.7, cached=204, **judge),
    ]  # fmt: skip


def make_decision(promote: bool = False) -> Decision:
    asked = 45 if promote else 50
    reasons = [
        Reason(rule="min_gain", passed=True, text="Gain over SFT +0.523 [+0.465 to +0.581]; asked: above 0."),
        Reason(rule="max_kl", passed=True, text="KL to the reference 6.21 nats; asked: at most 10."),
        Reason(rule="min_win_rate", passed=promote,
               text=f"Win rate against the champion 52.1% [46.6% to 57.6%]; asked: low end above {asked}%."),
        Reason(rule="no_regression", passed=True, text="No tested measure is worse than the champion's."),
    ]  # fmt: skip
    return Decision(
        promote=promote, candidate="imdb-dpo version 4", champion="imdb-dpo version 3",
        reasons=sorted(reasons, key=lambda reason: reason.passed),
    )  # fmt: skip


def hostile_measured(text: str) -> dict[str, Any]:
    """Decision, win rates, suites and comparisons with a text wherever people, data or models write one."""
    suite = make_suites()[0]
    measures = [m.model_copy(update={"label": text, "unit": text}) for m in suite.measures]
    measures[1] = measures[1].model_copy(update={"subset": text})
    comparison = make_comparison("SFT")
    rows = [row.model_copy(update={"label": text}) for row in comparison.rows]
    rows[0] = rows[0].model_copy(update={"suite": text, "subset": text})
    return {
        "decision": Decision(
            promote=False, candidate=text, champion=text,
            reasons=[Reason(rule=text, passed=False, text=text), Reason(rule=text, passed=True, text=text)],
        ),
        "win_rates": [make_win_rates()[1].model_copy(update={"a": text, "b": text, "judge": text})],
        "suites": [suite.model_copy(update={"title": text, "policy": text, "measures": measures})],
        "comparisons": [
            comparison.model_copy(
                update={"candidate": text, "baseline": text, "rows": rows, "left_out": [text]}
            )
        ],
    }  # fmt: skip
