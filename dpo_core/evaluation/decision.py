"""Decides whether a candidate may replace the champion: a set of rules, all of which must hold."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dpo_core.config import Config
from dpo_core.errors import RecipeError
from dpo_core.evaluation.compare import Comparison, ComparisonRow, worse_categories
from dpo_core.evaluation.config import GAIN, PromotionConfig
from dpo_core.statistics.estimates import Estimate
from dpo_core.statistics.format import interval

NEW_WEIGHTS = "new_weights"
"""Rule that refuses the champion's own weights; no other rule is checked then."""


class Reason(Config):
    """One rule of the decision."""

    rule: str
    """Its name in the recipe."""
    passed: bool
    skipped: bool = False
    """Whether there was nothing to check; the rule does not refuse then."""
    worse: bool = False
    """Whether the candidate is clearly worse than the champion."""
    text: str
    """The measured and the required value, in one sentence."""


class Decision(Config):
    """The verdict on a candidate."""

    promote: bool
    candidate: str
    champion: str
    """The baseline: a registered version, or the reference if there is no champion yet."""
    reasons: list[Reason]
    """All rules, failed ones first."""


@dataclass(frozen=True)
class Evidence:
    """The measurements on which a candidate is judged."""

    gain: Estimate | None
    """Mean reward of the candidate minus the champion's on the same prompts."""
    kl: Estimate | None
    """Nats a sequence from the reference."""
    comparison: Comparison | None
    """The candidate against the champion on the suites; None if no suite was run."""
    gate_passed: bool
    """Whether the data gate found no critical fault."""
    alarms: Mapping[str, str] | None = None
    """Messages about the candidate, its reference and its data, by name; None if they were not checked."""


def decide(config: PromotionConfig, evidence: Evidence, *, candidate: str, champion: str) -> Decision:
    """Check every rule; the candidate is promoted if all hold.

    Args:
        candidate, champion: their names in sentences ("champion v3"; "the reference" if there is none).

    Raises:
        RecipeError: `primary` is not a measure of the comparison with a better direction.
    """
    comparison, alarms = evidence.comparison, evidence.alarms
    name, difference = _primary(config.primary, evidence.gain, comparison)
    reasons = [*_difference_reasons(config, f"{name} over {champion}", difference)]
    if config.max_kl is not None:
        reasons.append(_kl_reason(config.max_kl, evidence.kl))
    if config.data_gate:
        text = "no critical fault" if evidence.gate_passed else "a critical fault"
        reasons.append(
            _reason("data_gate", evidence.gate_passed, f"the data gate found {text} in the training data")
        )
    if alarms is not None and config.alarms:
        reasons.append(_alarm_reason(config.alarms, alarms))
    reasons += _suite_reasons(config, champion, comparison)
    return Decision(
        promote=all(reason.passed for reason in reasons),
        candidate=candidate,
        champion=champion,
        reasons=sorted(reasons, key=lambda reason: reason.passed),
    )


def refuse_same_weights(candidate: str, champion: str) -> Decision:
    """The decision on a candidate that has the champion's weights."""
    reason = _reason(NEW_WEIGHTS, False, "the weights are those of the champion")
    return Decision(promote=False, candidate=candidate, champion=champion, reasons=[reason])


def _primary(name: str, gain: Estimate | None, comparison: Comparison | None) -> tuple[str, Estimate | None]:
    """Name and difference of the primary measure, with the sign that larger is better."""
    if name == GAIN:
        return "reward gain", gain
    rows = [row for row in comparison.rows if not row.subset] if comparison else []
    for row in rows:
        if f"{row.suite}/{row.measure}" == name and row.better != "neither":
            return f"{row.suite} {row.label}", row.difference if row.better == "higher" else -row.difference
    names = [f"{row.suite}/{row.measure}" for row in rows if row.better != "neither"]
    raise RecipeError(
        f"promotion.primary is '{name}', which was not compared",
        f"Set it to one of: {', '.join([GAIN, *names])}",
    )


def _difference_reasons(config: PromotionConfig, name: str, difference: Estimate | None) -> list[Reason]:
    if difference is None:
        return [_reason("min_gain", False, f"{name} was not measured; it must be above {config.min_gain:g}")]
    passed = difference.low > config.min_gain
    measured = f"{name} {interval(difference, 'gap')} on {difference.n} prompts"
    worse = difference.high < min(0, config.min_gain)
    verdict = "" if passed else "worse, not " if worse else "not "
    enough = difference.n >= config.min_prompts
    return [
        _reason("min_gain", passed, f"{measured}: {verdict}above {config.min_gain:g}", worse=worse),
        _reason(
            "min_prompts",
            enough,
            f"{difference.n} prompts compared: {'at least' if enough else 'fewer than'} {config.min_prompts}"
            + ("" if enough else ". Add data, or raise data.eval_fraction or evaluate.prompts"),
        ),
    ]


def _kl_reason(limit: float, kl: Estimate | None) -> Reason:
    if kl is None:
        return _reason(
            "max_kl", False, f"KL to the reference was not measured; it must be at most {limit:g} nats"
        )
    passed = kl.high <= limit
    measured = f"KL (k1) to the reference {interval(kl)} nats on {kl.n} prompts"
    verdict = "at most" if passed else "the interval exceeds"
    return _reason("max_kl", passed, f"{measured}: {verdict} {limit:g}")


def _alarm_reason(refusing: Sequence[str], raised: Mapping[str, str]) -> Reason:
    messages = [f"{name}: {raised[name]}" for name in refusing if name in raised]
    if messages:
        return _reason("alarms", False, " ".join(messages))
    return _reason("alarms", True, f"none of these alarms was raised: {', '.join(refusing)}")


def _suite_reasons(config: PromotionConfig, champion: str, comparison: Comparison | None) -> list[Reason]:
    rows = [row for row in comparison.rows if row.p_holm is not None] if comparison else []
    safety = [row for row in rows if row.suite in config.safety]
    reasons = []
    if config.required:
        missing = [name for name in config.required if name not in {row.suite for row in rows}]
        text = f"not compared with {champion} on {', '.join(missing)}" if missing else "all were compared"
        reasons.append(_reason("required", not missing, f"suites {', '.join(config.required)}: {text}"))
    if config.no_regression:
        others = [row for row in rows if row.suite not in config.safety]
        reasons.append(_regression_reason("no_regression", others, champion, "measures of suites"))
    if safety:
        reasons.append(_regression_reason("safety", safety, champion, "measures of safety"))
    if config.categories:
        parts = [row for row in comparison.rows if row.suite in config.categories] if comparison else []
        reasons.append(_category_reason(config.categories, parts, champion))
    return reasons


def _category_reason(suites: Sequence[str], rows: Sequence[ComparisonRow], champion: str) -> Reason:
    categories = {(row.suite, row.subset) for row in rows if row.subset}
    missing = [suite for suite in suites if suite not in {suite for suite, _ in categories}]
    if missing:
        text = f"no categories of {', '.join(missing)} were compared with {champion}'s"
        return _reason("categories", False, f"{text}. Add them to suites.names")
    worse = worse_categories(rows)
    if not worse:
        count = f"none of {len(categories)} categories of {', '.join(suites)}"
        return _reason("categories", True, f"{count} is significantly worse than {champion}'s")
    details = "; ".join(f"{row.subset}, {_regression(row)}" for row in worse)
    return _reason("categories", False, f"categories significantly worse than {champion}'s: {details}")


def _regression_reason(rule: str, rows: Sequence[ComparisonRow], champion: str, measures: str) -> Reason:
    if not rows:
        return Reason(rule=rule, passed=True, skipped=True, text=f"no {measures} were compared")
    worse = [row for row in rows if row.finding == "worse"]
    if not worse:
        return _reason(rule, True, f"none of {len(rows)} {measures} is significantly worse than {champion}'s")
    details = "; ".join(map(_regression, worse))
    count = f"{len(worse)} of {len(rows)}"
    return _reason(rule, False, f"{count} {measures} significantly worse than {champion}'s: {details}")


def _regression(row: ComparisonRow) -> str:
    difference = interval(row.difference, "points" if row.kind == "share" else "gap")
    return f"{row.suite} {row.label} {difference} on {row.difference.n} prompts, p {row.p_holm:.2g}"


def _reason(rule: str, passed: bool, text: str, worse: bool = False) -> Reason:
    return Reason(rule=rule, passed=passed, worse=worse, text=text)
