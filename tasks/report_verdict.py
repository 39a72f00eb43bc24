"""What a run's numbers say in one line, with the reasons."""

from typing import Literal, NamedTuple

from dpo_core.evaluation.decision import Decision
from tasks.report import RunReport
from tasks.report_numbers import cell, number


class Verdict(NamedTuple):
    headline: str
    kind: Literal["good", "bad", "unclear"]
    reasons: list[str]


def verdict(report: RunReport) -> Verdict:
    """The decision to promote where one was made, else whether DPO beat SFT."""
    return finding(report) if report.decision is None else decided(report.decision)


def decided(decision: Decision) -> Verdict:
    """The decision in words: what it comes to, then every rule, those that failed first.

    A symbol and a word say whether a rule holds, so that no reader needs the colour.
    """
    rules = sorted(decision.reasons, key=lambda reason: reason.passed)
    failed = sum(not reason.passed for reason in rules)
    if decision.promote:
        outcome = f"{decision.candidate} may take the place of {decision.champion}: every rule holds."
    else:
        held = f"{failed} of {len(rules)} rules {'does' if failed == 1 else 'do'} not hold"
        outcome = f"{decision.candidate} does not take the place of {decision.champion}: {held}."
    marked = [f"{'✓ passed' if reason.passed else '✗ failed'}: {reason.text}" for reason in rules]
    promote = decision.promote
    return Verdict(
        "Promote" if promote else "Do not promote", "good" if promote else "bad", [outcome, *marked]
    )


def finding(report: RunReport) -> Verdict:
    """Whether DPO beat SFT: the 95 % interval of the paired gain decides, and nothing else does."""
    refused = [row.subject for row in report.gate if row.refused]
    if refused:
        return Verdict(f"The data gate refused {', '.join(refused)}", "bad", ["Nothing after the gate ran."])
    evaluation = report.evaluation
    dpo = evaluation.policy("DPO") if evaluation else None
    if evaluation is None or dpo is None:
        return Verdict("DPO was not evaluated", "unclear", ["The run has no measurement of a DPO policy."])
    if dpo.gain is None:
        return Verdict(
            "DPO was not compared with SFT", "unclear", ["The paired difference was not measured."]
        )

    gain = cell("gain", dpo.gain)
    if dpo.gain.low > 0:
        outcome: tuple[str, Literal["good", "bad", "unclear"]] = ("DPO scores higher than SFT", "good")
    elif dpo.gain.high < 0:
        outcome = ("DPO scores lower than SFT", "bad")
    else:
        outcome = ("No difference between DPO and SFT is shown", "unclear")
    reasons = [
        f"Reward gain over SFT {gain.value}, 95% interval {gain.interval}, paired on {dpo.gain.n:,} prompts."
    ]
    if dpo.gain.low <= 0 <= dpo.gain.high:
        reasons.append("The interval contains zero: this run can neither show nor exclude an improvement.")
    if dpo.win_rate:
        reasons.append(f"Win rate against SFT {cell('win_rate', dpo.win_rate)}.")
    for other in evaluation.policies:
        if other.name not in ("SFT", "DPO") and other.gain:
            at_kl = f" at KL {number(other.kl.value)} nats" if other.kl else ""
            own = f" (DPO: KL {number(dpo.kl.value)} nats)" if dpo.kl else ""
            reasons.append(f"{other.name} gains {cell('gain', other.gain)}{at_kl}{own}.")
    if evaluation.reward_is_true:
        reasons.append(f"The reward {evaluation.reward_name} is the task's true objective.")
    else:
        reasons.append(
            f"The reward {evaluation.reward_name} is a learned proxy: part of a gain may be its exploitation."
        )
    return Verdict(*outcome, reasons)
