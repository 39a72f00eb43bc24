"""Whether a model may take the champion's place, and why: a rule for each reason, all of which must hold."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dpo_core.config import Config
from dpo_core.errors import RecipeError
from dpo_core.evaluation.compare import Comparison, Row
from dpo_core.evaluation.config import GAIN, PromotionConfig
from dpo_core.statistics.estimates import Estimate

NEW_WEIGHTS = "new_weights"
"""Rule that refuses the champion's own weights; no other rule is asked then."""


class Reason(Config):
    """One rule of the decision."""

    rule: str
    """Its name in the recipe."""
    passed: bool
    skipped: bool = False
    """Whether there was nothing to judge; it does not refuse then."""
    text: str
    """What was measured and what was asked for, in one sentence."""


class Decision(Config):
    """The verdict on a candidate."""

    promote: bool
    candidate: str
    champion: str
    """What it was held against: a registered version, or the reference where there is no champion yet."""
    reasons: list[Reason]
    """All rules, those that failed first."""


@dataclass(frozen=True)
class Evidence:
    """What is known of a candidate."""

    gain: Estimate | None
    """Mean reward of the candidate minus the champion's on the same prompts."""
    kl: Estimate | None
    """Nats a sequence from the reference."""
    comparison: Comparison | None
    """The candidate against the champion on the suites; None where no suite was run."""
    gate_green: bool
    """Whether the data gate found no critical fault."""
    alarms: Mapping[str, str] | None = None
    """Messages about the candidate, its reference and its data, by name; None if nobody looked."""


def decide(config: PromotionConfig, evidence: Evidence, *, candidate: str, champion: str) -> Decision:
    """Judge a candidate by every rule; it is promoted where all hold.

    Args:
        candidate, champion: as sentences name them ("champion v3"; "the reference" while there is none).

    Raises:
        RecipeError: `primary` names no measure of the comparison that has a better direction.
    """
    comparison, alarms = evidence.comparison, evidence.alarms
    what, difference = _primary(config.primary, evidence.gain, comparison)
    reasons = [*_of_difference(config, f"{what} over {champion}", difference)]
    if config.max_kl is not None:
        reasons.append(_of_kl(config.max_kl, evidence.kl))
    if config.data_gate:
        text = "no critical fault" if evidence.gate_green else "a critical fault"
        reasons.append(
            _reason("data_gate", evidence.gate_green, f"the data gate found {text} in the training data")
        )
    if alarms is not None and config.alarms:
        reasons.append(_of_alarms(config.alarms, alarms))
    reasons += _of_suites(config, champion, comparison)
    return Decision(
        promote=all(reason.passed for reason in reasons),
        candidate=candidate,
        champion=champion,
        reasons=sorted(reasons, key=lambda reason: reason.passed),
    )


def nothing_new(candidate: str, champion: str) -> Decision:
    """The decision on a candidate whose weights are the champion's own."""
    reason = _reason(NEW_WEIGHTS, False, "the weights are those of the champion")
    return Decision(promote=False, candidate=candidate, champion=champion, reasons=[reason])


def _primary(name: str, gain: Estimate | None, comparison: Comparison | None) -> tuple[str, Estimate | None]:
    """What the primary measure is called, and its difference, larger being better."""
    if name == GAIN:
        return "reward gain", gain
    rows = [row for row in comparison.rows if not row.subset] if comparison else []
    for row in rows:
        if f"{row.suite}/{row.measure}" == name and row.better != "neither":
            return f"{row.suite} {row.label}", row.difference if row.better == "higher" else -row.difference
    known = [f"{row.suite}/{row.measure}" for row in rows if row.better != "neither"]
    raise RecipeError(
        f"promotion.primary is '{name}', and that was not compared",
        f"Name one of: {', '.join([GAIN, *known])}",
    )


def _of_difference(config: PromotionConfig, what: str, difference: Estimate | None) -> list[Reason]:
    if difference is None:
        return [_reason("min_gain", False, f"{what} was not measured: above {config.min_gain:g} is asked")]
    passed = difference.low > config.min_gain
    measured = f"{what} {_signed(difference)} on {difference.n} prompts"
    verdict = "" if passed else "worse, not " if difference.high < min(0, config.min_gain) else "not "
    enough = difference.n >= config.min_prompts
    return [
        _reason("min_gain", passed, f"{measured}: {verdict}above {config.min_gain:g}"),
        _reason(
            "min_prompts",
            enough,
            f"{difference.n} prompts compared: {'at least' if enough else 'fewer than'} {config.min_prompts}",
        ),
    ]


def _of_kl(limit: float, kl: Estimate | None) -> Reason:
    if kl is None:
        return _reason(
            "max_kl", False, f"KL to the reference was not measured: at most {limit:g} nats is asked"
        )
    passed = kl.high <= limit
    measured = f"KL to the reference {kl.value:.3g} [{kl.low:.3g}, {kl.high:.3g}] nats on {kl.n} prompts"
    return _reason("max_kl", passed, f"{measured}: {'' if passed else 'not surely '}at most {limit:g}")


def _of_alarms(refusing: Sequence[str], raised: Mapping[str, str]) -> Reason:
    found = [f"{name}: {raised[name]}" for name in refusing if name in raised]
    if found:
        return _reason("alarms", False, " ".join(found))
    return _reason("alarms", True, f"none of these alarms was raised: {', '.join(refusing)}")


def _of_suites(config: PromotionConfig, champion: str, comparison: Comparison | None) -> list[Reason]:
    rows = [row for row in comparison.rows if row.p_holm is not None] if comparison else []
    harm = [row for row in rows if row.suite in config.safety]
    reasons = []
    if config.required:
        missing = [name for name in config.required if name not in {row.suite for row in rows}]
        text = f"not compared with {champion} on {', '.join(missing)}" if missing else "all were compared"
        reasons.append(_reason("required", not missing, f"suites {', '.join(config.required)}: {text}"))
    if config.no_regression:
        others = [row for row in rows if row.suite not in config.safety]
        reasons.append(_of_rows("no_regression", others, champion, "measures of suites"))
    if harm:
        reasons.append(_of_rows("safety", harm, champion, "measures of safety"))
    return reasons


def _of_rows(rule: str, rows: Sequence[Row], champion: str, what: str) -> Reason:
    if not rows:
        return Reason(rule=rule, passed=True, skipped=True, text=f"no {what} were compared")
    worse = [row for row in rows if row.finding == "worse"]
    if not worse:
        return _reason(rule, True, f"none of {len(rows)} {what} is found worse than {champion}'s")
    told = "; ".join(
        f"{row.suite} {row.label} {_signed(row.difference)} on {row.difference.n} prompts, p {row.p_holm:.2g}"
        for row in worse
    )
    return _reason(rule, False, f"{len(worse)} of {len(rows)} {what} found worse than {champion}'s: {told}")


def _reason(rule: str, passed: bool, text: str) -> Reason:
    return Reason(rule=rule, passed=passed, text=text)


def _signed(estimate: Estimate) -> str:
    return f"{estimate.value:+.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"
