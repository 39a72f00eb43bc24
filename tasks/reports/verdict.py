"""A run's verdict in one line, with its reasons: the promotion decision, or the gain over the reference."""

from collections.abc import Sequence
from typing import NamedTuple

from dpo_core.evaluation.decision import NEW_WEIGHTS, Decision, Reason
from dpo_core.evaluation.policy_row import PolicyRow
from dpo_core.statistics.format import interval, number, percent
from tasks.recipe.policies import REFERENCE
from tasks.reports.alarms import Alarm, alarms
from tasks.reports.document import Item, Tone
from tasks.reports.run_report import RunReport


class Verdict(NamedTuple):
    headline: str
    kind: Tone
    reasons: list[str]
    rules: Sequence[Item] = ()
    """The rules of a decision, failed ones first. A symbol and a word tell the result without colour."""


def verdict(report: RunReport) -> Verdict:
    """The promotion decision if there is one, else whether the candidate beat the reference."""
    return finding(report) if report.decision is None else decided(report.decision, alarms(report))


def decided(decision: Decision, raised: Sequence[Alarm] = ()) -> Verdict:
    """The decision in words.

    Args:
        raised: alarms of the run. They do not refuse the model, but a person should look at them before
            promoting it.
    """
    if any(reason.rule == NEW_WEIGHTS for reason in decision.reasons):
        same = f"{decision.candidate} has the weights of the champion, {decision.champion}."
        return Verdict("Nothing new: these are the champion's weights", "unclear", [same])
    reasons = sorted(decision.reasons, key=lambda reason: reason.passed)
    rules = [_rule(reason) for reason in reasons]
    failed = sum(not reason.passed for reason in reasons)
    if not decision.promote:
        held = f"{failed} of {len(rules)} rules {'fails' if failed == 1 else 'fail'}"
        outcome = f"{decision.candidate} does not replace {decision.champion}: {held}."
        worse = any(reason.worse for reason in reasons)
        headline = f"Do not promote: worse than {decision.champion}" if worse else "Do not promote"
        return Verdict(headline, "bad", [outcome], rules)
    outcome = f"{decision.candidate} may replace {decision.champion}: every rule holds."
    if raised:
        first = "an alarm" if len(raised) == 1 else f"{len(raised)} alarms"
        names = ", ".join(dict.fromkeys(alarm.name for alarm in raised))
        return Verdict(f"Promote? Look at {first} first", "unclear", [f"{outcome} Alarms: {names}."], rules)
    return Verdict("Promote", "good", [outcome], rules)


def _rule(reason: Reason) -> Item:
    if reason.skipped:
        return Item(reason.text, "– skipped", "plain", reason.rule)
    if reason.passed:
        return Item(reason.text, "✓ passed", "good", reason.rule)
    return Item(reason.text, "✗ failed", "bad", reason.rule)


def finding(report: RunReport) -> Verdict:
    """Whether the candidate beat the reference, decided by the 95 % interval of the paired gain."""
    refused = [row.subject for row in report.gate if row.refused]
    if refused:
        return Verdict(f"The data gate refused {', '.join(refused)}", "bad", ["Nothing after the gate ran."])
    evaluation, name = report.evaluation, report.candidate
    policy = evaluation.policy(name) if evaluation else None
    if evaluation is None or policy is None:
        return Verdict(f"{name} was not evaluated", "unclear", [f"The run has no evaluation of {name}."])
    if policy.gain is None:
        why = "The paired difference was not measured."
        return Verdict(f"{name} was not compared with {REFERENCE}", "unclear", [why])
    gain, own, reference = interval(policy.gain, "gap"), report.label(name), report.label(REFERENCE)
    reasons = [
        f"Reward gain over {reference} {gain.value}, 95% interval {gain.bounds}, paired on "
        f"{policy.gain.n:,} prompts."
    ]
    headline, tone = f"No difference between {own} and {reference} is shown", "unclear"
    if policy.gain.low > 0:
        headline, tone = f"{own} scores higher than {reference}", "good"
    elif policy.gain.high < 0:
        headline, tone = f"{own} scores lower than {reference}", "bad"
    else:
        reasons.append("The interval contains zero: this run can neither show nor exclude an improvement.")
    if policy.gain.low <= 0 and policy.accuracy and policy.accuracy.low > 0.5:
        accuracy = percent(policy.accuracy.value)
        reasons.append(
            f"Preference accuracy is {accuracy} without a gain: {own} tells the data's chosen from its "
            "rejected answers, but the answers that it writes itself are not shown to be better."
        )
    if policy.win_rate:
        reasons.append(f"Win rate against {reference} {interval(policy.win_rate, 'share')}.")
    others = [row for row in evaluation.policies if row.name not in (REFERENCE, name) and row.gain]
    reasons += [_beside(report, policy, other) for other in others]
    return Verdict(headline, tone, [*reasons, measured_with(report)])  # type: ignore[arg-type]


def _beside(report: RunReport, policy: PolicyRow, other: PolicyRow) -> str:
    """Gain and KL of another policy, with the candidate's KL."""
    # Prefer k3, which is never negative: a negative distance looks like an error.
    both = other.kl_k3 is not None and policy.kl_k3 is not None
    theirs, ours = (other.kl_k3, policy.kl_k3) if both else (other.kl, policy.kl)
    at_kl = f" at KL ({'k3' if both else 'k1'}) {number(theirs.value)} nats" if theirs else ""
    beside = f" ({report.label(policy.name)}: KL {number(ours.value)} nats)" if ours else ""
    gain = interval(other.gain, "gap") if other.gain else "–"
    return f"{report.label(other.name)}: gain {gain}{at_kl}{beside}."


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
