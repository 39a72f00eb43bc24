"""A run's verdict in one line, with its reasons: the promotion decision, or the gain over the reference."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from dpo_core.evaluation.decision import NEW_WEIGHTS, Decision, Reason
from tasks.recipe.policies import REFERENCE
from tasks.reports.alarms import Alarm, alarms
from tasks.reports.format import cell, number
from tasks.reports.run_report import RunReport


class Verdict(NamedTuple):
    headline: str
    kind: Literal["good", "bad", "unclear"]
    reasons: list[str]


def verdict(report: RunReport) -> Verdict:
    """The promotion decision if there is one, else whether the candidate beat the reference."""
    return finding(report) if report.decision is None else decided(report.decision, alarms(report))


def decided(decision: Decision, raised: Sequence[Alarm] = ()) -> Verdict:
    """The decision in words: the outcome, then every rule, failed ones first.

    A symbol and a word show whether a rule holds, so that no reader needs colour.

    Args:
        raised: alarms of the run. They do not refuse the model, but a person should look at them before
            promoting it.
    """
    if any(reason.rule == NEW_WEIGHTS for reason in decision.reasons):
        same = f"{decision.candidate} has the weights of the champion, {decision.champion}."
        return Verdict("Nothing new: these are the champion's weights", "unclear", [same])
    rules = sorted(decision.reasons, key=lambda reason: reason.passed)
    failed = sum(not reason.passed for reason in rules)
    if decision.promote:
        outcome = f"{decision.candidate} may replace {decision.champion}: every rule holds."
    else:
        held = f"{failed} of {len(rules)} rules {'fails' if failed == 1 else 'fail'}"
        outcome = f"{decision.candidate} does not replace {decision.champion}: {held}."
    marked = [f"{mark(reason)}: {reason.text}" for reason in rules]
    if not decision.promote:
        worse = any(reason.worse for reason in rules)
        headline = f"Do not promote: worse than {decision.champion}" if worse else "Do not promote"
        return Verdict(headline, "bad", [outcome, *marked])
    if raised:
        first = "an alarm" if len(raised) == 1 else f"{len(raised)} alarms"
        names = ", ".join(dict.fromkeys(alarm.name for alarm in raised))
        return Verdict(f"Promote? Look at {first} first", "unclear", [f"{outcome} Alarms: {names}.", *marked])
    return Verdict("Promote", "good", [outcome, *marked])


def mark(reason: Reason) -> str:
    """The result of a rule as a symbol and a word."""
    if reason.skipped:
        return "– skipped"
    return "✓ passed" if reason.passed else "✗ failed"


def finding(report: RunReport) -> Verdict:
    """Whether the candidate beat the reference, decided by the 95 % interval of the paired gain."""
    refused = [row.subject for row in report.gate if row.refused]
    if refused:
        return Verdict(f"The data gate refused {', '.join(refused)}", "bad", ["Nothing after the gate ran."])
    evaluation = report.evaluation
    name = report.candidate
    policy = evaluation.policy(name) if evaluation else None
    if evaluation is None or policy is None:
        return Verdict(f"{name} was not evaluated", "unclear", [f"The run has no evaluation of {name}."])
    if policy.gain is None:
        return Verdict(
            f"{name} was not compared with {REFERENCE}",
            "unclear",
            ["The paired difference was not measured."],
        )

    gain, own = cell(policy.gain, "gap"), report.label(name)
    if policy.gain.low > 0:
        outcome: tuple[str, Literal["good", "bad", "unclear"]] = (
            f"{own} scores higher than {REFERENCE}",
            "good",
        )
    elif policy.gain.high < 0:
        outcome = (f"{own} scores lower than {REFERENCE}", "bad")
    else:
        outcome = (f"No difference between {own} and {REFERENCE} is shown", "unclear")
    reasons = [
        f"Reward gain over {REFERENCE} {gain.value}, 95% interval {gain.interval}, paired on "
        f"{policy.gain.n:,} prompts."
    ]
    if policy.gain.low <= 0 <= policy.gain.high:
        reasons.append("The interval contains zero: this run can neither show nor exclude an improvement.")
    if policy.win_rate:
        reasons.append(f"Win rate against {REFERENCE} {cell(policy.win_rate, 'share')}.")
    for other in evaluation.policies:
        if other.name not in (REFERENCE, name) and other.gain:
            # Prefer k3, which is never negative: a negative distance looks like an error.
            both = other.kl_k3 is not None and policy.kl_k3 is not None
            theirs, ours = (other.kl_k3, policy.kl_k3) if both else (other.kl, policy.kl)
            estimator = "k3" if both else "k1"
            at_kl = f" at KL ({estimator}) {number(theirs.value)} nats" if theirs else ""
            beside = f" ({own}: KL {number(ours.value)} nats)" if ours else ""
            reasons.append(f"{report.label(other.name)}: gain {cell(other.gain, 'gap')}{at_kl}{beside}.")
    return Verdict(*outcome, [*reasons, measured_with(report)])


def measured_with(report: RunReport) -> str:
    """A sentence on the reward of the evaluation and the policies that learned from it."""
    evaluation = report.evaluation
    assert evaluation is not None
    name, learned = evaluation.reward_name, evaluation.learned_from
    if not evaluation.reward_is_true:
        kind = "The reward model" if name == "reward model" else f"The reward {name}"
        return f"{kind} is a learned proxy: part of a gain may be reward exploitation."
    if learned is None:
        return f"Measured with {name}."
    if not learned:
        return f"Measured with {name}, which no policy of this run learned from."
    *others, last = map(report.label, learned)
    names = f"{', '.join(others)} and {last}" if others else last
    return (
        f"Measured with {name}, which {names} also learned from: a gain may not carry over to other measures."
    )
