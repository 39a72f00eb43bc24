"""Published claims held against a study. The rules err towards "undecided".

An interval that contains both sides of a claim decides nothing, and neither does a policy of which a setting
has fewer than `SEEDS` seeds. What each seed measured once is judged by the range over the seeds. "supported"
speaks of this study's model, data and settings; it proves nothing about others.

Three seeds that differ as much as the policies do make intervals too narrow all the same: in simulations of
equal policies, where prompts add little noise, about one study in eight was decided instead of one in twenty.
"""

from collections.abc import Sequence
from typing import Literal

from dpo_core.config import Config
from dpo_core.statistics.estimates import Estimate
from dpo_core.study.points import Study
from dpo_core.study.results import StudySummary
from dpo_core.study.summary import FEW

SEEDS = 3  # of every setting; three fall on one side of their median by chance in a quarter of cases
DEFINED = 0.95  # share of resamples in which a ratio must exist
COMPUTE_CLAIM, COMPUTE_SHARE = 1 / 3, 0.9
ENTROPY_CLAIM = 0.37
FEW_CLAIM = 0.15
DIRECT, RLHF = "DPO", ("PPO", "PPO-GT")
"""The policies that the claims speak of: on pairs; on samples, with a reward model or the known reward."""
DOMINATES = "dominates"
"""The word of the claim that a study's headline states."""
TOKEN_LEVEL = ("TDPO1", "TDPO2", "f-DPO")

Verdict = Literal["supported", "contradicted", "undecided", "not measured"]


class Claim(Config):
    """A published claim and what the study says of it."""

    claim: str
    claimed: str
    found: str
    verdict: Verdict


def claims(study: Study, summary: StudySummary) -> list[Claim]:
    """The claims whose policies the study has, by the names that the claims give them."""
    named = set(study.policies())
    judged: list[Claim] = []
    if DIRECT in named:
        judged += [_dominates(summary, rival) for rival in RLHF if rival in named]
    if study.base == DIRECT:  # compute and diversity are compared with the first policy's
        judged += [_compute(summary)] if RLHF[0] in named else []
        judged += [claim for name in TOKEN_LEVEL if name in named for claim in _diversity(summary, name)]
    return judged + ([_few_samples(summary)] if named.issuperset(FEW) else [])


def _dominates(summary: StudySummary, rival: str) -> Claim:
    """Judged where both policies are: the area to the KL that both reach, and the fixed KLs up to there.

    Supported: more in all of them. Contradicted: less in one of them.
    """
    claim = f"{DIRECT}'s reward-KL frontier {DOMINATES} {rival}'s"
    claimed = "more reward at every KL"
    difference = summary.difference(DIRECT, rival)
    if difference is None:
        return _absent(claim, claimed, DIRECT, rival)
    common = [at for at in difference.at_kl if at.reached]
    found = f"DPO minus {rival}: mean gain up to {summary.kl_end:g} nats {_words(difference.area)}"
    if difference.common_area and difference.common_kl < summary.kl_end:
        found += f", up to the {difference.common_kl:.3g} that both reach {_words(difference.common_area)}"
    found += "".join(f"; at {at.kl:g} nats {_words(at.reward)}" for at in common)
    verdict: Verdict = "undecided"
    if not common or difference.common_area is None:
        found += "; no fixed KL that both reach"
    elif not _too_few(summary, DIRECT, rival):
        parts = [difference.common_area, *(at.reward for at in common)]
        if all(part.low > 0 for part in parts):
            verdict = "supported"
        elif any(part.high < 0 for part in parts):
            verdict = "contradicted"
    return Claim(claim=claim, claimed=claimed, found=found + _seeds(summary, DIRECT, rival), verdict=verdict)


def _compute(summary: StudySummary) -> Claim:
    """Supported: at most a third, by the whole interval. Contradicted: more than a third, likewise."""
    claim, claimed = "DPO needs a third of RLHF's compute for the same reward", "at most 0.333 of PPO's FLOPs"
    wanted = (DIRECT, RLHF[0], COMPUTE_SHARE)
    rows = [r for r in summary.compute if (r.policy, r.other, r.gain_share) == wanted]
    if not rows:
        return _absent(claim, claimed, DIRECT, RLHF[0])
    (row,) = rows
    if row.ratio is None:
        found = "DPO and PPO have no gain in common to compare at"
        return Claim(claim=claim, claimed=claimed, found=found, verdict="undecided")
    found = (
        f"{row.ratio.value:.3g} of PPO's FLOPs ({row.ratio.low:.3g} to {row.ratio.high:.3g}) at "
        f"{row.gain_share:.0%} of the gain that both reach, defined in {row.defined:.0%} of resamples"
    )
    sure = row.defined >= DEFINED and not _too_few(summary, DIRECT, RLHF[0])
    verdict = _at_least(-row.ratio.high, -row.ratio.low, -COMPUTE_CLAIM) if sure else "undecided"
    return Claim(
        claim=claim, claimed=claimed, found=found + _seeds(summary, DIRECT, RLHF[0]), verdict=verdict
    )


def _diversity(summary: StudySummary, policy: str) -> list[Claim]:
    """Supported: every seed at every common beta is on the claim's side. Contradicted: every one is not."""
    found = []
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
            f"{row.setting} {row.relative.value:+.1%} ({row.relative.low:+.1%} to {row.relative.high:+.1%})"
            for row in rows
        )
        words += f"; ranges over {fewest} seeds" if fewest > 1 else "; one seed"
        verdict: Verdict = sides.pop() if len(sides) == 1 and fewest >= SEEDS else "undecided"
        found.append(Claim(claim=claim, claimed=claimed, found=words, verdict=verdict))
    return found


def _few_samples(summary: StudySummary) -> Claim:
    """Supported: at least so much more gain over the reference, by the whole interval."""
    claim = "Pre-DPO gains more than DPO from few samples"
    claimed = f"{FEW_CLAIM:+.0%}"
    rows = [row for row in summary.gains if (row.policy, row.other) == FEW]
    if not rows:
        return _absent(claim, claimed, *FEW)
    (row,) = rows
    if row.relative is None:
        found = f"DPO itself gains nothing: {_words(row.other_gain)}"
        return Claim(claim=claim, claimed=claimed, found=found, verdict="undecided")
    relative = row.relative
    found = (
        f"{relative.value:+.1%} gain over the reference ({relative.low:+.1%} to {relative.high:+.1%}), "
        f"defined in {row.defined:.0%} of resamples"
    )
    sure = row.defined >= DEFINED and row.fewest_seeds >= SEEDS
    verdict = _at_least(relative.low, relative.high, FEW_CLAIM) if sure else "undecided"
    return Claim(claim=claim, claimed=claimed, found=found + _seeds(summary, *FEW), verdict=verdict)


def _at_least(low: float, high: float, limit: float) -> Verdict:
    """Whether a number is at least `limit`, wholly below it, or neither for sure.

    At a limit of 0 it must be above: no difference is no more.
    """
    if low >= limit and (limit or low > 0):
        return "supported"
    return "contradicted" if high < limit else "undecided"


def _absent(claim: str, claimed: str, *policies: str) -> Claim:
    found = f"{' and '.join(policies)} share no setting"
    return Claim(claim=claim, claimed=claimed, found=found, verdict="not measured")


def _too_few(summary: StudySummary, *policies: str) -> bool:
    return _fewest_seeds(summary, policies) < SEEDS


def _seeds(summary: StudySummary, *policies: str) -> str:
    fewest = _fewest_seeds(summary, policies)
    count = f"; {fewest} seed{'s' if fewest > 1 else ''}"
    return count if fewest >= SEEDS else f"{count} of a setting, fewer than the {SEEDS} that a verdict needs"


def _fewest_seeds(summary: StudySummary, policies: Sequence[str]) -> int:
    return min(row.fewest_seeds for row in summary.policies if row.policy in policies)


def _words(estimate: Estimate) -> str:
    return f"{estimate.value:+.3g} ({estimate.low:+.3g} to {estimate.high:+.3g})"
