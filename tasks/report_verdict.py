"""What a run's numbers say: the verdict and the alarms, each a reading with its threshold beside it."""

from collections.abc import Iterable
from statistics import fmean, stdev
from typing import Literal, NamedTuple

from tasks.report import RunReport
from tasks.report_numbers import cell, number, percent

KL_LIMIT_NATS = (
    10.0  # beyond this the reward of every direct method has been seen to degrade (arXiv 2406.02900)
)
KL_TIMES_PPO = 3.0  # DPO this many times as far from the reference as PPO pays too much for its reward
KL_FLOOR_NATS = 1.0  # below one nat the ratio of two KLs is mostly noise
COLLAPSE_SHARE = 0.5  # entropy or distinct-2 under this share of SFT's
LENGTH_DRIFT = 1.5  # mean length longer than SFT's by this factor, or shorter by it
DISPLACED_REWARD = -0.05  # implicit reward of the chosen answers; nearer to 0 it is mostly noise
ACCURACY_DROP = 0.05  # fall of the mean accuracy between the two halves of training


class Verdict(NamedTuple):
    headline: str
    kind: Literal["good", "bad", "unclear"]
    reasons: list[str]


class Alarm(NamedTuple):
    name: str
    message: str


def series(rows: Iterable[dict[str, float]], metric: str) -> tuple[list[float], list[float]]:
    """(steps, values) of one metric; rows without it are passed over."""
    points = [(row["step"], row[metric]) for row in rows if metric in row and "step" in row]
    return [x for x, _ in points], [y for _, y in points]


def start_and_end(values: list[float]) -> tuple[float, float] | None:
    """Means of the first and the last tenth (single batches are noise); None for fewer than two values."""
    if len(values) < 2:
        return None
    tenth = max(1, len(values) // 10)
    return sum(values[:tenth]) / tenth, sum(values[-tenth:]) / tenth


def verdict(report: RunReport) -> Verdict:
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


def alarms(report: RunReport) -> list[Alarm]:
    """Signs of the known failures of preference training, each with the numbers that raised it."""
    found = _training_alarms(report)
    evaluation = report.evaluation
    sft = evaluation.policy("SFT") if evaluation else None
    trained = [row for row in evaluation.policies if row.name != "SFT"] if evaluation else []
    ppo = evaluation.policy("PPO") if evaluation else None
    for row in trained:
        kl = row.kl.value if row.kl else 0.0
        if kl > KL_LIMIT_NATS:
            found.append(Alarm("KL run-away", f"{row.name} is {number(kl)} nats from the reference."))
        elif row.name == "DPO" and ppo and ppo.kl and kl > max(KL_TIMES_PPO * ppo.kl.value, KL_FLOOR_NATS):
            found.append(
                Alarm(
                    "KL run-away", f"DPO is {number(kl)} nats from the reference, PPO {number(ppo.kl.value)}."
                )
            )
        if sft is None:
            continue
        for label, own, base in (
            ("entropy", row.entropy, sft.entropy),
            ("distinct-2", row.distinct_2, sft.distinct_2),
        ):
            if own is not None and base is not None and own < COLLAPSE_SHARE * base:
                found.append(
                    Alarm(
                        "Diversity collapse", f"{row.name}'s {label} is {number(own)}, SFT's {number(base)}."
                    )
                )
        own, base = row.length.value, sft.length.value
        if own > LENGTH_DRIFT * base or own * LENGTH_DRIFT < base:
            found.append(
                Alarm(
                    "Length drift", f"{row.name} writes {number(own)} tokens on average, SFT {number(base)}."
                )
            )
    if (weights := report.notes.get("Class weights")) is not None:
        found.append(Alarm("Class weights", str(weights)))
    for gate in report.gate:
        failed = [f for f in gate.findings if not f.passed and f.severity in ("critical", "warning")]
        if failed:
            rules = ", ".join(
                f"{f.rule} ({f.severity}{f', {f.count:,} rows' if f.count else ''})" for f in failed
            )
            found.append(Alarm("Data gate", f"{gate.subject}: {rules}."))
    return found


def _clearly_below_zero(values: list[float]) -> bool:
    """Whether the mean of the last quarter is below zero by two standard errors: batches differ."""
    last = values[-max(2, len(values) // 4) :]
    return len(last) > 1 and fmean(last) + 2 * stdev(last) / len(last) ** 0.5 < 0


def _training_alarms(report: RunReport) -> list[Alarm]:
    found = []
    dpo = report.evaluation.policy("DPO") if report.evaluation else None
    for rows in report.curves.values():
        chosen = start_and_end(series(rows, "logps/chosen")[1])
        rewards = series(rows, "rewards/chosen")[1]
        reward = start_and_end(rewards)
        fell = chosen and chosen[1] < chosen[0] and _clearly_below_zero(rewards)
        if chosen and reward and fell and reward[1] < DISPLACED_REWARD:
            found.append(
                Alarm(
                    "Likelihood displacement",
                    f"log p(chosen) fell from {number(chosen[0])} to {number(chosen[1])} and ended below "
                    f"the reference (implicit reward {number(reward[1])}): preferred answers became rarer.",
                )
            )
        accuracies = series(rows, "eval_rewards/accuracies")[1] or series(rows, "rewards/accuracies")[1]
        half = len(accuracies) // 2
        if half and dpo and dpo.gain and dpo.gain.value > 0:
            early, late = sum(accuracies[:half]) / half, sum(accuracies[half:]) / (len(accuracies) - half)
            if late < early - ACCURACY_DROP:
                message = f"The reward rose while accuracy fell from {percent(early)} to {percent(late)}."
                found.append(Alarm("Reward without accuracy", message))
    if dpo and dpo.accuracy and dpo.gain and dpo.gain.value > 0 and dpo.accuracy.high < 0.5:
        message = f"The reward rose, yet held-out preference accuracy is {cell('accuracy', dpo.accuracy)}."
        found.append(Alarm("Reward without accuracy", message))
    return found
