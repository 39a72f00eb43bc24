"""Alarms: detects known failures of preference training in a run's report, with the numbers behind each.

The failures: large KL, collapsed diversity, length drift, likelihood displacement, over-optimisation of the
reward, cut answers and noise.
"""

import math
from collections.abc import Iterable
from statistics import fmean, stdev
from typing import NamedTuple

from dpo_core.evaluation.policy_row import PolicyRow
from dpo_core.methods.diffusion import DISPLACED_ERROR
from dpo_core.statistics.format import interval, number, percent
from tasks.recipe.policies import REFERENCE
from tasks.reports.curves import clear_change, quarters, series, start_and_end
from tasks.reports.run_report import Evaluation, RunReport

KL_LIMIT_NATS = (
    10.0  # beyond this the reward of every direct method has been seen to degrade (arXiv 2406.02900)
)
# A policy trained on pairs raises an alarm if its KL is this many times that of a policy that samples.
KL_TIMES_SAMPLER = 3.0
KL_FLOOR_NATS = 1.0  # below one nat the ratio of two KLs is mostly noise
COLLAPSE_SHARE = 0.5  # entropy or distinct-2 under this share of SFT's
LENGTH_DRIFT = 1.5  # mean length longer than SFT's by this factor, or shorter by it
DISPLACED_REWARD = -0.05  # implicit reward of the chosen answers; nearer to 0 it is mostly noise
ACCURACY_DROP = 0.05  # fall of the mean accuracy between the two halves of training
KL_TIMES_TARGET = 3.0  # beyond this the adaptive KL coefficient no longer controls the KL
CUT_SHARE = 0.5  # smallest share of unfinished answers that raises an alarm
# Smallest share of complete answers in the data; if the data are cut by design, so are a policy's answers.
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
    """The policy concerned; empty if the alarm is about the run or its data."""


def alarms(report: RunReport) -> list[Alarm]:
    """All alarms of a run, each with the numbers that raised it."""
    raised = _training_alarms(report)
    evaluation = report.evaluation
    for row in evaluation.policies if evaluation else []:
        assert evaluation is not None
        found = {CUT: _cut(evaluation, row), NOISE: _noise(evaluation, row)}
        raised += _of_policy(report, row.name, found.items())
    for row in evaluation.policies if evaluation else []:
        raised += _drifts(report, row) if row.name != REFERENCE else []
    for name, about in report.policies.items():
        raised += [Alarm(UNUSUAL, f"{name}: {about.unusual}", name)] if about.unusual else []
    noted = (CLASS_WEIGHTS, REMOTE_CODE)
    raised += [Alarm(name, str(report.notes[name])) for name in noted if name in report.notes]
    for gate in report.gate:
        failed = [f for f in gate.findings if not f.passed and f.severity in ("critical", "warning")]
        lines = [f"{_sentence(f.message)} ({f.rule}, {f.severity}{_rows(f.count)})" for f in failed]
        raised += [Alarm("Data gate", f"{gate.subject}: {' '.join(lines)}")] if lines else []
    return raised


def _of_policy(report: RunReport, policy: str, found: Iterable[tuple[str, str]]) -> list[Alarm]:
    """Alarms of a policy by name, where a message was found."""
    name = report.label(policy)
    return [Alarm(alarm, f"{name}: {message}", policy) for alarm, message in found if message]


def _drifts(report: RunReport, row: PolicyRow) -> list[Alarm]:
    """Alarms from a policy's evaluation: its KL, diversity and length against the reference."""
    raised = []
    name, kl = report.label(row.name), row.kl.value if row.kl else 0.0
    sampler, sampled_kl = _farthest_sampler(report)
    direct = row.name in report.policies and row.name not in report.samplers
    if kl > KL_LIMIT_NATS:
        raised.append(Alarm("KL run-away", f"{name} is {number(kl)} nats from the reference.", row.name))
    elif direct and sampler and kl > max(KL_TIMES_SAMPLER * sampled_kl, KL_FLOOR_NATS):
        distance = f"{number(kl)} nats from the reference, {report.label(sampler)} {number(sampled_kl)}."
        raised.append(Alarm("KL run-away", f"{name} is {distance}", row.name))
    sft = report.evaluation.policy(REFERENCE) if report.evaluation else None
    if sft is None:
        return raised
    for measure, own, base in (
        ("entropy", row.entropy, sft.entropy),
        ("distinct-2", row.distinct_2, sft.distinct_2),
    ):
        if own is not None and base is not None and own < COLLAPSE_SHARE * base:
            message = f"{name}'s {measure} is {number(own)}, {REFERENCE}'s {number(base)}."
            raised.append(Alarm("Diversity collapse", message, row.name))
    own, base = (length.value if length else 0.0 for length in (row.length, sft.length))
    if own > LENGTH_DRIFT * base or own * LENGTH_DRIFT < base:
        message = f"{name} writes {number(own)} tokens on average, {REFERENCE} {number(base)}."
        raised.append(Alarm("Length drift", message, row.name))
    return raised


def _farthest_sampler(report: RunReport) -> tuple[str, float]:
    """Name and KL of the policy with the largest KL among those that learned from their own samples."""
    rows = report.evaluation.policies if report.evaluation else []
    kls = {row.name: row.kl.value for row in rows if row.kl and row.name in report.samplers}
    return max(kls.items(), key=lambda item: item[1], default=("", 0.0))


def _rows(count: int) -> str:
    return f", {count:,} rows" if count else ""


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."


def promotion_alarms(raised: list[Alarm], report: RunReport) -> dict[str, str]:
    """Messages, by alarm name, of the alarms about the candidate, its ancestors or its data."""
    concerned = ("", REFERENCE, report.candidate, *report.lineage(report.candidate))
    concern = [alarm for alarm in raised if alarm.policy in concerned]
    names = dict.fromkeys(alarm.name for alarm in concern)
    return {name: " ".join(alarm.message for alarm in concern if alarm.name == name) for name in names}


def cut_message(cut: float, limit: int, median: float) -> str:
    """The message about cut answers, with the setting to raise.

    Args:
        cut: share of the answers that are cut.
        limit: maximum number of tokens of a sampled answer.
        median: median length of the data's answers, in tokens.
    """
    return (
        f"{percent(cut)} of the answers are cut at evaluate.sampling.max_new_tokens {limit:,}, so their "
        f"reward is that of unfinished answers. The data's chosen answers have a median of {median:,.0f} "
        "tokens: raise evaluate.sampling.max_new_tokens."
    )


def _cut(evaluation: Evaluation, row: PolicyRow) -> str:
    limit, median, complete = evaluation.max_new_tokens, evaluation.chosen_tokens, evaluation.chosen_ended
    if row.ended is None or limit is None or median is None or complete is None:
        return ""
    cut = 1 - row.ended
    return cut_message(cut, limit, median) if cut >= CUT_SHARE and complete >= COMPLETE_SHARE else ""


def _noise(evaluation: Evaluation, row: PolicyRow) -> str:
    entropy = row.predictive_entropy.value if row.predictive_entropy else row.entropy
    most = math.log(evaluation.vocabulary or 1)
    if entropy is None or not most or entropy <= NOISE_SHARE * most:
        return ""
    return (
        f"it writes noise: its entropy is {number(entropy)} of at most {number(most)} nats per token, so "
        "comparisons with it are meaningless. Start from a trained model, or train the reference longer."
    )


def _clearly_below_zero(values: list[float]) -> bool:
    """Whether the mean of the last quarter is more than two standard errors below zero."""
    last = values[-max(2, len(values) // 4) :]
    return len(last) > 1 and fmean(last) + 2 * stdev(last) / len(last) ** 0.5 < 0


def _training_alarms(report: RunReport) -> list[Alarm]:
    raised: list[Alarm] = []
    rows_of = {row.name: row for row in report.evaluation.policies} if report.evaluation else {}
    for stage, rows in report.curves.items():
        policy = report.policy_of(stage)
        if policy is not None:  # else SFT or the reward model
            found = [
                ("Likelihood displacement", _displaced(report.policies[policy].reference, rows)),
                ("Reward without accuracy", _without_accuracy(rows, rows_of.get(policy))),
                *_on_policy_alarms(rows),
            ]
            raised += _of_policy(report, policy, found)
    for policy in report.policies:
        row = rows_of.get(policy)
        if (
            policy not in report.samplers
            and row
            and row.accuracy
            and _gained(row)
            and row.accuracy.high < 0.5
        ):
            message = (
                f"the reward rose, but held-out preference accuracy is {interval(row.accuracy, 'share')}."
            )
            raised += _of_policy(report, policy, [("Reward without accuracy", message)])
    return raised


def _gained(row: PolicyRow | None) -> bool:
    return row is not None and row.gain is not None and row.gain.value > 0


def _displaced(reference: str, rows: list[dict[str, float]]) -> str:
    """Likelihood displacement by the implicit reward, which compares a policy with its reference.

    Of a diffusion model, by the error on chosen images: it and that on rejected ones can rise together.
    """
    if errors := start_and_end(series(rows, "error/chosen")[1]):
        # What is logged as log-probs are errors at other noise levels in each step: no curve to compare.
        if errors[1] <= DISPLACED_ERROR:
            return ""
        return (
            f"the denoising error on chosen images ended at {number(errors[1])} times the reference's: "
            "preferred images became less likely."
        )
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
        f"(implicit reward {number(reward[1])}): preferred answers became less likely."
    )


def _without_accuracy(rows: list[dict[str, float]], row: PolicyRow | None) -> str:
    """For a policy trained on pairs: its reward rose while its preference accuracy fell."""
    accuracies = series(rows, "eval_rewards/accuracies")[1] or series(rows, "rewards/accuracies")[1]
    half = len(accuracies) // 2
    if not half or not _gained(row):
        return ""
    early, late = fmean(accuracies[:half]), fmean(accuracies[half:])
    if late >= early - ACCURACY_DROP:
        return ""
    drop = f"fell from {percent(early)} to {percent(late)}"
    return f"the evaluation's reward rose while the training's preference accuracy {drop}."


def _on_policy_alarms(rows: list[dict[str, float]]) -> list[tuple[str, str]]:
    """Alarms that only concern trainings that sample from their own policy."""
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
    parts = quarters(series(rows, "objective/kl")[1])
    if parts is None:
        return ""
    kl, targets = fmean(parts[1]), series(rows, "objective/kl_target")[1]
    far = f"the policy was {number(kl)} nats from the reference in the last quarter of training"
    if targets and kl > KL_TIMES_TARGET * targets[-1]:
        return f"{far}, for a target of {number(targets[-1])}."
    return f"{far}." if kl > KL_LIMIT_NATS else ""


def _entropy_collapsed(rows: list[dict[str, float]]) -> str:
    """Uses the entropy per token, because the entropy of a response also falls if answers get shorter."""
    values = series(rows, "policy/entropy_avg")[1] or [
        row["objective/entropy"] / row["completions/mean_length"]
        for row in rows
        if "objective/entropy" in row and row.get("completions/mean_length", 0) > 0
    ]
    ends = start_and_end(values)
    if ends is None or ends[1] >= COLLAPSE_SHARE * ends[0]:
        return ""
    return f"the entropy per token fell from {number(ends[0])} to {number(ends[1])} nats during training."
