"""Signs of the known failures of preference training, each with the numbers that raised it."""

import math
from statistics import fmean, stdev
from typing import NamedTuple

from dpo_core.evaluation.policy_row import PolicyRow
from tasks.recipe.policies import REFERENCE
from tasks.reports.curves import clear_change, quarters, series, start_and_end
from tasks.reports.format import cell, number, percent
from tasks.reports.run_report import Evaluation, RunReport

KL_LIMIT_NATS = (
    10.0  # beyond this the reward of every direct method has been seen to degrade (arXiv 2406.02900)
)
# A policy trained on pairs pays too much when it is this many times as far from the reference as one that
# samples.
KL_TIMES_SAMPLER = 3.0
KL_FLOOR_NATS = 1.0  # below one nat the ratio of two KLs is mostly noise
COLLAPSE_SHARE = 0.5  # entropy or distinct-2 under this share of SFT's
LENGTH_DRIFT = 1.5  # mean length longer than SFT's by this factor, or shorter by it
DISPLACED_REWARD = -0.05  # implicit reward of the chosen answers; nearer to 0 it is mostly noise
ACCURACY_DROP = 0.05  # fall of the mean accuracy between the two halves of training
KL_TIMES_TARGET = 3.0  # the steering of the KL coefficient has lost it
CUT_SHARE = 0.5  # of answers that do not end; from here on they are pointed out
# Of the data's answers that do: where these are cut by design, those of a policy are, too.
COMPLETE_SHARE = 0.5
NOISE_SHARE = 0.85  # of ln(vocabulary), the entropy of uniform noise; frequent words alone are far below


REMOTE_CODE = "Remote code"
UNUSUAL = "Unusual parameters"
CLASS_WEIGHTS = "Class weights"
CUT, NOISE = "Cut answers", "Noise"


class Alarm(NamedTuple):
    name: str
    message: str
    policy: str = ""
    """Whose; empty where it is of the run or its data."""


def alarms(report: RunReport) -> list[Alarm]:
    """Signs of the known failures of preference training, each with the numbers that raised it."""
    found = _training_alarms(report) + _answer_alarms(report)
    evaluation = report.evaluation
    sft = evaluation.policy(REFERENCE) if evaluation else None
    trained = [row for row in evaluation.policies if row.name != REFERENCE] if evaluation else []
    found += [alarm for row in trained for alarm in _policy_alarms(report, row, sft)]
    for name, about in report.policies.items():
        if about.unusual:
            found.append(Alarm(UNUSUAL, f"{name}: {about.unusual}", name))
    # Older reports have unusual parameters as a note of the run.
    found += [
        Alarm(name, str(report.notes[name]))
        for name in (UNUSUAL, CLASS_WEIGHTS, REMOTE_CODE)
        if name in report.notes
    ]
    for gate in report.gate:
        failed = [f for f in gate.findings if not f.passed and f.severity in ("critical", "warning")]
        if failed:
            told = [f"{f.rule} ({f.severity}{_rows(f.count)}): {_sentence(f.message)}" for f in failed]
            found.append(Alarm("Data gate", f"{gate.subject}: {' '.join(told)}"))
    return found


def _policy_alarms(report: RunReport, row: PolicyRow, sft: PolicyRow | None) -> list[Alarm]:
    """Of a policy's evaluation: distance, diversity and length, to the reference's."""
    found = []
    name, kl = report.label(row.name), row.kl.value if row.kl else 0.0
    sampler, sampled_kl = _farthest_sampler(report)
    direct = row.name in report.policies and row.name not in report.samplers
    if kl > KL_LIMIT_NATS:
        found.append(Alarm("KL run-away", f"{name} is {number(kl)} nats from the reference.", row.name))
    elif direct and sampler and kl > max(KL_TIMES_SAMPLER * sampled_kl, KL_FLOOR_NATS):
        paid = f"{number(kl)} nats from the reference, {report.label(sampler)} {number(sampled_kl)}."
        found.append(Alarm("KL run-away", f"{name} is {paid}", row.name))
    if sft is None:
        return found
    for measure, own, base in (
        ("entropy", row.entropy, sft.entropy),
        ("distinct-2", row.distinct_2, sft.distinct_2),
    ):
        if own is not None and base is not None and own < COLLAPSE_SHARE * base:
            message = f"{name}'s {measure} is {number(own)}, {REFERENCE}'s {number(base)}."
            found.append(Alarm("Diversity collapse", message, row.name))
    own, base = row.length.value, sft.length.value
    if own > LENGTH_DRIFT * base or own * LENGTH_DRIFT < base:
        message = f"{name} writes {number(own)} tokens on average, {REFERENCE} {number(base)}."
        found.append(Alarm("Length drift", message, row.name))
    return found


def _farthest_sampler(report: RunReport) -> tuple[str, float]:
    """Of the policies that learned from their own samples, the one farthest from the reference."""
    rows = report.evaluation.policies if report.evaluation else []
    kls = {row.name: row.kl.value for row in rows if row.kl and row.name in report.samplers}
    return max(kls.items(), key=lambda item: item[1], default=("", 0.0))


def _rows(count: int) -> str:
    return f", {count:,} rows" if count else ""


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."


def against_promotion(raised: list[Alarm], report: RunReport) -> dict[str, str]:
    """Messages of the alarms that concern the candidate, the models behind it or its data, by name."""
    behind = ("", REFERENCE, report.candidate, *report.lineage(report.candidate))
    concern = [alarm for alarm in raised if alarm.policy in behind]
    names = dict.fromkeys(alarm.name for alarm in concern)
    return {name: " ".join(alarm.message for alarm in concern if alarm.name == name) for name in names}


def cut_message(cut: float, limit: int, median: float) -> str:
    """How many answers are cut, and what to raise.

    Args:
        cut: share of the answers.
        limit: tokens of a sampled answer, at most.
        median: of the data's own answers, in tokens.
    """
    return (
        f"{percent(cut)} of the answers are cut at evaluate.sampling.max_new_tokens {limit:,}, and their "
        f"reward is that of unfinished answers. The data's chosen answers have a median of {median:,.0f} "
        "tokens: raise evaluate.sampling.max_new_tokens."
    )


def _answer_alarms(report: RunReport) -> list[Alarm]:
    """What shows that answers are not worth comparing: they are cut, or noise."""
    found: list[Alarm] = []
    evaluation = report.evaluation
    for row in evaluation.policies if evaluation else []:
        assert evaluation is not None
        told = {CUT: _cut(evaluation, row), NOISE: _noise(evaluation, row)}
        who = report.label(row.name)
        found += [Alarm(name, f"{who}: {message}", row.name) for name, message in told.items() if message]
    return found


def _cut(evaluation: Evaluation, row: PolicyRow) -> str:
    limit, whole, complete = evaluation.max_new_tokens, evaluation.chosen_tokens, evaluation.chosen_ended
    if row.ended is None or limit is None or whole is None or complete is None:
        return ""
    cut = 1 - row.ended
    return cut_message(cut, limit, whole) if cut >= CUT_SHARE and complete >= COMPLETE_SHARE else ""


def _noise(evaluation: Evaluation, row: PolicyRow) -> str:
    entropy = row.predictive_entropy.value if row.predictive_entropy else row.entropy
    most = math.log(evaluation.vocabulary or 1)
    if entropy is None or not most or entropy <= NOISE_SHARE * most:
        return ""
    return (
        f"it writes noise: its entropy is {number(entropy)} of at most {number(most)} nats a token, and no "
        "comparison with it means anything. Start from a trained model, or train the reference longer."
    )


def _clearly_below_zero(values: list[float]) -> bool:
    """Whether the mean of the last quarter is below zero by two standard errors: batches differ."""
    last = values[-max(2, len(values) // 4) :]
    return len(last) > 1 and fmean(last) + 2 * stdev(last) / len(last) ** 0.5 < 0


def _training_alarms(report: RunReport) -> list[Alarm]:
    found: list[Alarm] = []
    for stage, rows in report.curves.items():
        policy = report.policy_of(stage)
        if policy is None:  # SFT and the reward model
            continue
        name, row = report.label(policy), report.evaluation.policy(policy) if report.evaluation else None
        found += [
            Alarm(alarm, f"{name}: {message}", policy)
            for alarm, message in (
                ("Likelihood displacement", _displaced(report.policies[policy].reference, rows)),
                ("Reward without accuracy", _without_accuracy(rows, row)),
                *_on_policy_alarms(rows),
            )
            if message
        ]
    for policy in report.policies:
        row = report.evaluation.policy(policy) if report.evaluation else None
        if policy in report.samplers or row is None or row.accuracy is None or not _gained(row):
            continue
        if row.accuracy.high < 0.5:
            accuracy = cell(row.accuracy, "share")
            message = f"the reward rose, yet held-out preference accuracy is {accuracy}."
            found.append(Alarm("Reward without accuracy", f"{report.label(policy)}: {message}", policy))
    return found


def _gained(row: PolicyRow | None) -> bool:
    return row is not None and row.gain is not None and row.gain.value > 0


def _displaced(reference: str, rows: list[dict[str, float]]) -> str:
    """By the implicit reward, which compares a policy with what it is held to."""
    chosen = start_and_end(series(rows, "logps/chosen")[1])
    rewards = series(rows, "rewards/chosen")[1]
    reward = start_and_end(rewards)
    if not chosen or not reward or chosen[1] >= chosen[0] or reward[1] >= DISPLACED_REWARD:
        return ""
    if not _clearly_below_zero(rewards):
        return ""
    below = "the reference" if reference == REFERENCE else reference
    return (
        f"log p(chosen) fell from {number(chosen[0])} to {number(chosen[1])} and ended below {below} "
        f"(implicit reward {number(reward[1])}): preferred answers became rarer."
    )


def _without_accuracy(rows: list[dict[str, float]], row: PolicyRow | None) -> str:
    """Of a policy that learned from pairs: its reward rose while it ranked them worse."""
    accuracies = series(rows, "eval_rewards/accuracies")[1] or series(rows, "rewards/accuracies")[1]
    half = len(accuracies) // 2
    if not half or not _gained(row):
        return ""
    early, late = fmean(accuracies[:half]), fmean(accuracies[half:])
    if late >= early - ACCURACY_DROP:
        return ""
    drop = f"fell from {percent(early)} to {percent(late)}"
    return f"the evaluation's reward rose while the preference accuracy of the training {drop}."


def _on_policy_alarms(rows: list[dict[str, float]]) -> list[tuple[str, str]]:
    """What only a training shows that samples from its own policy."""
    if not series(rows, "objective/scores")[1]:
        return []
    return [
        ("Over-optimisation", _over_optimised(rows)),
        ("KL run-away", _kl_ran_away(rows)),
        ("Entropy collapse", _entropy_collapsed(rows)),
    ]


def _over_optimised(rows: list[dict[str, float]]) -> str:
    both = [row for row in rows if "objective/scores" in row and "objective/gold_scores" in row]
    before, after, rise = clear_change([row["objective/scores"] for row in both])
    known_before, known_after, change = clear_change([row["objective/gold_scores"] for row in both])
    if rise != 1 or change != -1:
        return ""
    return (
        f"the learned reward rose from {number(before)} to {number(after)} while the known reward fell from "
        f"{number(known_before)} to {number(known_after)} (first and last quarter of training)."
    )


def _kl_ran_away(rows: list[dict[str, float]]) -> str:
    found = quarters(series(rows, "objective/kl")[1])
    if found is None:
        return ""
    kl, targets = fmean(found[1]), series(rows, "objective/kl_target")[1]
    far = f"the policy was {number(kl)} nats from the reference in the last quarter of training"
    if targets and kl > KL_TIMES_TARGET * targets[-1]:
        return f"{far}, for a target of {number(targets[-1])}."
    return f"{far}." if kl > KL_LIMIT_NATS else ""


def _entropy_collapsed(rows: list[dict[str, float]]) -> str:
    """By the entropy of a token: that of a response also falls where answers become short."""
    values = series(rows, "policy/entropy_avg")[1] or [
        row["objective/entropy"] / row["completions/mean_length"]
        for row in rows
        if "objective/entropy" in row and row.get("completions/mean_length", 0) > 0
    ]
    found = start_and_end(values)
    if found is None or found[1] >= COLLAPSE_SHARE * found[0]:
        return ""
    return f"the entropy of a token fell from {number(found[0])} to {number(found[1])} nats during training."
