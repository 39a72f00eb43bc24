"""What is said of a study, as data: one model for each table. Intervals are at 95 %."""

from pydantic import Field

from dpo_core.config import Config
from dpo_core.statistics.estimates import Estimate
from dpo_core.study.envelopes import XY
from dpo_core.study.points import Cost


class SeedRange(Config):
    """A number that each seed measured once: too few for an interval, so the range stands for it."""

    value: float
    """Mean over the seeds."""
    low: float
    high: float
    seeds: int


class SettingRow(Config):
    """One setting of one policy: the mean over its seeds."""

    policy: str
    setting: str
    seeds: list[int]
    reward: Estimate
    gain: Estimate
    """Over the reference, paired on the prompts."""
    seed_rewards: SeedRange
    """The same reward by seed: how much runs differ."""
    kl: Estimate
    """Estimator k1."""
    kl_k3: Estimate
    entropy: float
    distinct_1: float
    distinct_2: float
    length: float
    cost: Cost
    """FLOPs and seconds are means over the seeds, memory is the largest."""
    shared_cost: dict[str, float] = Field(default_factory=dict)


class AtKl(Config):
    """A reward, or a difference of rewards, on the envelope at one KL."""

    kl: float
    reward: Estimate
    reached: bool
    """False: no setting came that far: the envelope is its flat end (of either policy, for a difference)."""


class PolicySummary(Config):
    """What one policy's settings offer together."""

    policy: str
    settings: int
    seeds: list[int]
    fewest_seeds: int
    """Seeds of the setting that has fewest."""
    area: Estimate
    """Mean gain of the envelope from 0 to the study's last KL."""
    reach: float
    """Nats of the setting that went farthest."""
    at_kl: list[AtKl]
    envelope: list[XY]
    """Its corners in the (KL, reward) plane, from the reference."""
    staircase: list[XY]
    """Steps of (FLOPs, reward): each costs more than the one before and reaches more."""


class PolicyDifference(Config):
    """One policy's envelope minus another's, on the same prompts and seeds."""

    policy: str
    other: str
    area: Estimate
    """To the study's last KL, the flat ends included."""
    common_kl: float
    """Nats that both policies reach, within the study's last KL; one may just not have been pushed beyond."""
    common_area: Estimate | None
    """To `common_kl`; None where one policy did not leave the reference."""
    at_kl: list[AtKl]
    """Intervals that hold at all these KLs together (Bonferroni): any of them may be pointed at."""


class ComputeRatio(Config):
    """What a policy's compute is to another's where both reach the same reward."""

    policy: str
    other: str
    gain_share: float
    """The reward asked for: this share of the largest gain that both reach, in each resample anew."""
    reward: float | None
    """As measured; None where one of the policies gains nothing."""
    flops: float | None
    other_flops: float | None
    ratio: Estimate | None
    """Over the resamples in which it is defined."""
    defined: float
    """Share of resamples in which both policies gain something."""


class DiversityDifference(Config):
    """How much more varied one policy writes than another at one setting, relative, paired by seed."""

    policy: str
    other: str
    setting: str
    metric: str
    """"entropy", "distinct_1" or "distinct_2"."""
    relative: SeedRange
    """0.37 says 37 % more."""


class GainRatio(Config):
    """One policy's gain over the reference against another's, at the settings that both have."""

    policy: str
    other: str
    settings: list[str]
    fewest_seeds: int
    gain: Estimate
    other_gain: Estimate
    relative: Estimate | None
    """0.15 says 15 % more gain. Over the resamples in which the other policy gains something."""
    defined: float
    """Share of those resamples."""


class BestOfRow(Config):
    """The best of n samples of the reference."""

    n: int
    kl_bound: float
    reward: Estimate
    gain: Estimate


class StudySummary(Config):
    """Everything that the tables and figures of a study show."""

    prompts: int
    seeds: list[int]
    resamples: int
    kl_end: float
    kl_at: list[float]
    reference: Estimate
    """Its reward."""
    settings: list[SettingRow]
    policies: list[PolicySummary]
    differences: list[PolicyDifference]
    """Each pair of policies once, the one that comes first in the study minus the other."""
    compute: list[ComputeRatio]
    diversity: list[DiversityDifference]
    gains: list[GainRatio]
    best_of: list[BestOfRow]

    def policy(self, name: str) -> PolicySummary | None:
        """The row of that policy, None where the study has none."""
        return next((row for row in self.policies if row.policy == name), None)

    def rows(self, policy: str) -> list[SettingRow]:
        """The policy's settings."""
        return [row for row in self.settings if row.policy == policy]

    def difference(self, policy: str, other: str) -> PolicyDifference | None:
        """`policy` minus `other`, whichever way it is kept."""
        for row in self.differences:
            if (row.policy, row.other) == (policy, other):
                return row
            if (row.policy, row.other) == (other, policy):
                at_kl = [at.model_copy(update={"reward": _negated(at.reward)}) for at in row.at_kl]
                return row.model_copy(
                    update={
                        "policy": policy,
                        "other": other,
                        "area": _negated(row.area),
                        "common_area": _negated(row.common_area) if row.common_area else None,
                        "at_kl": at_kl,
                    }
                )
        return None


def _negated(estimate: Estimate) -> Estimate:
    return Estimate(value=-estimate.value, low=-estimate.high, high=-estimate.low, n=estimate.n)
