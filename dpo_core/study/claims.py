"""Judges published claims by a study. The rules err towards "undecided".

An interval that contains both sides of a claim decides nothing, nor does a policy with fewer than `SEEDS`
seeds at a setting. A number that each seed measures once is judged by its range over the seeds. "supported"
holds for this study's model, data and settings; it proves nothing about others.

With three seeds that differ as much as the policies do, intervals are still too narrow: in simulations of
equal policies where prompts add little noise, about one study in eight was decided instead of one in twenty.
"""

from collections.abc import Sequence
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
    judged: list[Claim] = []
    if DIRECT in named:
        judged += [_dominates(summary, rival) for rival in RLHF if rival in named]
    if study.base == DIRECT:  # compute and diversity are compared with the first policy's
        judged += [_compute(summary)] if RLHF[0] in named else []
        judged += [claim for name in TOKEN_LEVEL if name in named for claim in _diversity(summary, name)]
    return judged + ([_few_samples(summary)] if named.issuperset(FEW) else [])


def _dominates(summary: StudySummary, rival: str) -> Claim:
    """Compared within the KL that both policies reach: the area, and the rewards at the fixed KLs.

    Supported: more in all of them. Contradicted: less in one of them.
    """
    claim = f"{DIRECT}'s reward-KL frontier {DOMINATES} {rival}'s"
    claimed = "more reward at every KL"
    difference = summary.difference(DIRECT, rival)
    if difference is None:
        return _absent(claim, claimed, DIRECT, rival)
    common = [at for at in difference.at_kl if at.reached]
    result = f"DPO minus {rival}: mean gain up to {summary.kl_end:g} nats {_words(difference.area)}"
    if difference.common_area and difference.common_kl < summary.kl_end:
        result += f", up to the {difference.common_kl:.3g} that both reach {_words(difference.common_area)}"
    result += "".join(f"; at {at.kl:g} nats {_words(at.reward)}" for at in common)
    verdict: Verdict = "undecided"
    if not common or difference.common_area is None:
        result += "; no fixed KL that both reach"
    elif not _too_few(summary, DIRECT, rival):
        parts = [difference.common_area, *(at.reward for at in common)]
        if all(part.low > 0 for part in parts):
            verdict = "supported"
        elif any(part.high < 0 for part in parts):
            verdict = "contradicted"
    return Claim(claim=claim, claimed=claimed, found=result + _seeds(summary, DIRECT, rival), verdict=verdict)


def _compute(summary: StudySummary) -> Claim:
    """Supported: the whole interval is at most a third. Contradicted: all of it is above a third."""
    claim, claimed = "DPO needs a third of RLHF's compute for the same reward", "at most 0.333 of PPO's FLOPs"
    key = (DIRECT, RLHF[0], COMPUTE_SHARE)
    rows = [r for r in summary.compute if (r.policy, r.other, r.gain_share) == key]
    if not rows:
        return _absent(claim, claimed, DIRECT, RLHF[0])
    (row,) = rows
    if row.ratio is None:
        result = "DPO and PPO share no gain at which to compare"
        return Claim(claim=claim, claimed=claimed, found=result, verdict="undecided")
    result = (
        f"{interval(row.ratio)} of PPO's FLOPs at "
        f"{row.gain_share:.0%} of the gain that both reach, defined in {row.defined:.0%} of resamples"
    )
    sure = row.defined >= DEFINED and not _too_few(summary, DIRECT, RLHF[0])
    verdict = _at_least(-row.ratio.high, -row.ratio.low, -COMPUTE_CLAIM) if sure else "undecided"
    return Claim(
        claim=claim, claimed=claimed, found=result + _seeds(summary, DIRECT, RLHF[0]), verdict=verdict
    )


def _diversity(summary: StudySummary, policy: str) -> list[Claim]:
    """Supported: all seeds at all common betas satisfy the claim. Contradicted: none does."""
    verdicts = []
    for metric, name, limit in (
        ("entropy", "entropy", ENTROPY_CLAIM),
        ("distinct_1", "distinct-1", 0.0),
        ("distinct_2", "distinct-2", 0.0),
    ):
        claim = f"{policy} has more {name} than DPO"
        claimed = f"{limit:+.0%} at the same β" if limit else "more at the same β"
        rows = [r for r in summary.diversity if (r.policy, r.other, r.metric) == (policy, DIRECT, metric)]
        if not rows:
            return [_absent(claim, claimed, policy, DIRECT)]
        ranges = [row.relative for row in rows]
        sides = {_at_least(part.low, part.high, limit) for part in ranges}
        fewest = min(part.seeds for part in ranges)
        words = "; ".join(
            f"{row.setting} {row.relative.value:+.1%} [{row.relative.low:+.1%} to {row.relative.high:+.1%}]"
            for row in rows
        )
        words += f"; ranges over {fewest} seeds" if fewest > 1 else "; one seed"
        verdict: Verdict = sides.pop() if len(sides) == 1 and fewest >= SEEDS else "undecided"
        verdicts.append(Claim(claim=claim, claimed=claimed, found=words, verdict=verdict))
    return verdicts


def _few_samples(summary: StudySummary) -> Claim:
    """Supported: the whole interval is at or above the claimed extra gain over the reference."""
    claim = "Pre-DPO gains more than DPO from few samples"
    claimed = f"{FEW_CLAIM:+.0%}"
    rows = [row for row in summary.gains if (row.policy, row.other) == FEW]
    if not rows:
        return _absent(claim, claimed, *FEW)
    (row,) = rows
    if row.relative is None:
        result = f"DPO itself gains nothing: {_words(row.other_gain)}"
        return Claim(claim=claim, claimed=claimed, found=result, verdict="undecided")
    relative = row.relative
    result = (
        f"{relative.value:+.1%} gain over the reference [{relative.low:+.1%} to {relative.high:+.1%}], "
        f"defined in {row.defined:.0%} of resamples"
    )
    sure = row.defined >= DEFINED and row.fewest_seeds >= SEEDS
    verdict = _at_least(relative.low, relative.high, FEW_CLAIM) if sure else "undecided"
    return Claim(claim=claim, claimed=claimed, found=result + _seeds(summary, *FEW), verdict=verdict)


def _at_least(low: float, high: float, limit: float) -> Verdict:
    """Whether an interval is at or above `limit`, below it, or contains it.

    At a limit of 0 it must be above 0: no difference is not more.
    """
    if low >= limit and (limit or low > 0):
        return "supported"
    return "contradicted" if high < limit else "undecided"


def _absent(claim: str, claimed: str, *policies: str) -> Claim:
    result = f"{' and '.join(policies)} share no setting"
    return Claim(claim=claim, claimed=claimed, found=result, verdict="not measured")


def _too_few(summary: StudySummary, *policies: str) -> bool:
    return _fewest_seeds(summary, policies) < SEEDS


def _seeds(summary: StudySummary, *policies: str) -> str:
    fewest = _fewest_seeds(summary, policies)
    count = f"; {fewest} seed{'s' if fewest > 1 else ''}"
    return count if fewest >= SEEDS else f"{count} of a setting, fewer than the {SEEDS} that a verdict needs"


def _fewest_seeds(summary: StudySummary, policies: Sequence[str]) -> int:
    return min(row.fewest_seeds for row in summary.policies if row.policy in policies)


def _words(estimate: Estimate) -> str:
    return str(interval(estimate, "gap"))
