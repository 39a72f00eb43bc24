"""Judges published claims by a study. The rules err towards "undecided".

An interval that contains both sides of a claim decides nothing, nor does a policy with fewer than `SEEDS`
seeds at a setting. A number that each seed measures once is judged by its range over the seeds. "supported"
holds for this study's model, data and settings; it proves nothing about others.

With three seeds that differ as much as the policies do, intervals are still too narrow: in simulations of
equal policies where prompts add little noise, about one study in eight was decided instead of one in twenty.
"""

from typing import Literal

from dpo_core.config import Config
from dpo_core.statistics.estimates import Estimate
from dpo_core.statistics.format import interval
from dpo_core.study.results import StudySummary
from dpo_core.study.study_data import Study
from dpo_core.study.summary import FEW

SEEDS = 3  # at every setting; three seeds fall on one side of their median by chance in a quarter of cases
DEFINED = 0.95  # share of resamples in which a ratio must exist
COMPUTE_CLAIM, COMPUTE_SHARE = 1 / 3, 0.9
ENTROPY_CLAIM = 0.37
FEW_CLAIM = 0.15
DIRECT, RLHF = "DPO", ("PPO", "PPO-GT")
"""Policies of the claims: trained on pairs; on samples, with a reward model or with the known reward."""
DOMINATES = "dominates"
"""Verb of the claim that a study's headline states."""
TOKEN_LEVEL = ("TDPO1", "TDPO2", "f-DPO")
DOMAINS = (("scenes", DIRECT, "GRPO", 0.1153), ("scenes_gen", "GRPO", DIRECT, 0.0242))
"""Tong et al. 2025 (arXiv 2505.17017): DPO is ahead on the kind of prompts that it was trained on, GRPO on
others."""
DOMAIN_WORDS = {"scenes": "in domain", "scenes_gen": "out of domain"}

Verdict = Literal["supported", "contradicted", "undecided", "not measured"]


class Claim(Config):
    """A published claim and the study's verdict on it."""

    claim: str
    claimed: str
    found: str
    verdict: Verdict


def claims(study: Study, summary: StudySummary) -> list[Claim]:
    """The claims about policies that the study has, matched by name."""
    named = set(study.policies())
    judged = [_dominates(summary, rival) for rival in RLHF if named.issuperset((DIRECT, rival))]
    if study.base == DIRECT:  # compute and diversity are compared with the first policy's
        judged += [_compute(summary)] if RLHF[0] in named else []
        judged += [claim for name in TOKEN_LEVEL if name in named for claim in _diversity(summary, name)]
    judged += [_few_samples(summary)] if named.issuperset(FEW) else []
    return judged + ([claim for row in DOMAINS if (claim := _on_suite(summary, *row))])


def _on_suite(summary: StudySummary, suite: str, policy: str, other: str, limit: float) -> Claim | None:
    """Supported: the whole interval of the relative difference is at or above the claimed one."""
    key = (suite, policy, other)
    found = [row for row in summary.suite_differences if (row.suite, row.policy, row.other) == key]
    if not found:
        return None
    (row,) = found
    settings = {r.policy: r.setting for r in summary.suites if r.suite == suite}
    text = f"{policy} ({settings[policy]}) minus {other} ({settings[other]}): {_words(row.difference)}"
    verdict: Verdict = "undecided"
    if row.relative is not None:
        text += f", {row.relative.value:+.1%} [{row.relative.low:+.1%} to {row.relative.high:+.1%}]"
        if row.fewest_seeds >= SEEDS:
            verdict = _at_least(row.relative.low, row.relative.high, limit)
    return Claim(
        claim=f"{policy} scores higher than {other} {DOMAIN_WORDS[suite]}",
        claimed=f"{limit:+.2%}",
        found=f"{text}; {row.fewest_seeds} seeds",
        verdict=verdict,
    )


def _dominates(summary: StudySummary, rival: str) -> Claim:
    """Compared within the KL that both policies reach: the area, and the rewards at the fixed KLs.

    Supported: more in all of them. Contradicted: less in one of them.
    """
    difference = summary.difference(DIRECT, rival)
    assert difference is not None, "the summary has every pair of policies"
    common = [at for at in difference.at_kl if at.reached]
    found = f"DPO minus {rival}: mean gain up to {summary.kl_end:g} nats {_words(difference.area)}"
    if difference.common_area and difference.common_kl < summary.kl_end:
        found += f", up to the {difference.common_kl:.3g} that both reach {_words(difference.common_area)}"
    found += "".join(f"; at {at.kl:g} nats {_words(at.reward)}" for at in common)
    enough, seeds = _seeds(summary, DIRECT, rival)
    verdict: Verdict = "undecided"
    if not common or difference.common_area is None:
        found += "; no fixed KL that both reach"
    elif enough:
        parts = [difference.common_area, *(at.reward for at in common)]
        if all(part.low > 0 for part in parts):
            verdict = "supported"
        elif any(part.high < 0 for part in parts):
            verdict = "contradicted"
    return Claim(
        claim=f"{DIRECT}'s reward-KL frontier {DOMINATES} {rival}'s", claimed="more reward at every KL",
        found=found + seeds, verdict=verdict,
    )  # fmt: skip


def _compute(summary: StudySummary) -> Claim:
    """Supported: the whole interval is at most a third. Contradicted: all of it is above a third."""
    key = (DIRECT, RLHF[0], COMPUTE_SHARE)
    (row,) = (r for r in summary.compute if (r.policy, r.other, r.gain_share) == key)
    found = "DPO and PPO share no gain at which to compare"
    verdict: Verdict = "undecided"
    if row.ratio is not None:
        enough, seeds = _seeds(summary, DIRECT, RLHF[0])
        found = (
            f"{interval(row.ratio)} of PPO's FLOPs at "
            f"{row.gain_share:.0%} of the gain that both reach, defined in {row.defined:.0%} of resamples"
        ) + seeds
        if enough and row.defined >= DEFINED:
            verdict = _at_least(-row.ratio.high, -row.ratio.low, -COMPUTE_CLAIM)
    return Claim(
        claim="DPO needs a third of RLHF's compute for the same reward",
        claimed="at most 0.333 of PPO's FLOPs", found=found, verdict=verdict,
    )  # fmt: skip


def _diversity(summary: StudySummary, policy: str) -> list[Claim]:
    """Supported: all seeds at all common betas satisfy the claim. Contradicted: none does."""
    judged = []
    for metric, limit in (("entropy", ENTROPY_CLAIM), ("distinct_1", 0.0), ("distinct_2", 0.0)):
        claim = f"{policy} has more {metric.replace('_', '-')} than DPO"
        claimed = f"{limit:+.0%} at the same β" if limit else "more at the same β"
        rows = [r for r in summary.diversity if (r.policy, r.other, r.metric) == (policy, DIRECT, metric)]
        if not rows:
            return [_not_measured(claim, claimed, policy, DIRECT)]
        sides = {_at_least(row.relative.low, row.relative.high, limit) for row in rows}
        fewest = min(row.relative.seeds for row in rows)
        found = "; ".join(
            f"{row.setting} {row.relative.value:+.1%} [{row.relative.low:+.1%} to {row.relative.high:+.1%}]"
            for row in rows
        )
        found += f"; ranges over {fewest} seeds" if fewest > 1 else "; one seed"
        verdict: Verdict = sides.pop() if len(sides) == 1 and fewest >= SEEDS else "undecided"
        judged.append(Claim(claim=claim, claimed=claimed, found=found, verdict=verdict))
    return judged


def _few_samples(summary: StudySummary) -> Claim:
    """Supported: the whole interval is at or above the claimed extra gain over the reference."""
    claim, claimed = "Pre-DPO gains more than DPO from few samples", f"{FEW_CLAIM:+.0%}"
    if not summary.gains:
        return _not_measured(claim, claimed, *FEW)
    (row,) = summary.gains
    found = f"DPO itself gains nothing: {_words(row.other_gain)}"
    verdict: Verdict = "undecided"
    if row.relative is not None:
        _, seeds = _seeds(summary, *FEW)
        low, high = row.relative.low, row.relative.high
        found = (
            f"{row.relative.value:+.1%} gain over the reference [{low:+.1%} to {high:+.1%}], "
            f"defined in {row.defined:.0%} of resamples"
        ) + seeds
        if row.defined >= DEFINED and row.fewest_seeds >= SEEDS:
            verdict = _at_least(low, high, FEW_CLAIM)
    return Claim(claim=claim, claimed=claimed, found=found, verdict=verdict)


def _at_least(low: float, high: float, limit: float) -> Verdict:
    """Whether an interval is at or above `limit`, below it, or contains it.

    At a limit of 0 it must be above 0: no difference is not more.
    """
    if low >= limit and (limit or low > 0):
        return "supported"
    return "contradicted" if high < limit else "undecided"


def _not_measured(claim: str, claimed: str, policy: str, other: str) -> Claim:
    found = f"{policy} and {other} share no setting"
    return Claim(claim=claim, claimed=claimed, found=found, verdict="not measured")


def _seeds(summary: StudySummary, *policies: str) -> tuple[bool, str]:
    """Whether all settings of the policies have enough seeds for a verdict, and their number in words."""
    fewest = min(row.fewest_seeds for row in summary.policies if row.policy in policies)
    count = f"; {fewest} seed{'s' if fewest > 1 else ''}"
    if fewest >= SEEDS:
        return True, count
    return False, f"{count} of a setting, fewer than the {SEEDS} that a verdict needs"


def _words(estimate: Estimate) -> str:
    return str(interval(estimate, "gap"))
