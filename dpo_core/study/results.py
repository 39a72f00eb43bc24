"""The summary of a study as data, one class for each table. Intervals are at 95 %."""

from pydantic import Field

from dpo_core.config import Config
from dpo_core.statistics.estimates import Estimate
from dpo_core.study.envelopes import XY
from dpo_core.study.study_data import PolicyCost


class SeedRange(Config):
    """A number that each seed measured once: its range over the seeds, which are too few for an interval."""

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
    cost: PolicyCost
    """FLOPs and seconds are means over the seeds, memory is the largest."""
    shared_cost: dict[str, float] = Field(default_factory=dict)


class AtKl(Config):
    """A reward, or a difference of rewards, on the envelope at one KL."""

    kl: float
    reward: Estimate
    reached: bool
    """False: no setting reached this KL, and the envelope (in a difference, of either policy) is flat."""


class PolicySummary(Config):
    """One policy over all its settings."""

    policy: str
    settings: int
    seeds: list[int]
    fewest_seeds: int
    """Number of seeds of the setting with the fewest."""
    area: Estimate
    """Mean gain of the envelope from 0 to the study's last KL."""
    reach: float
    """Largest KL of a setting, in nats."""
    at_kl: list[AtKl]
    envelope: list[XY]
    """Corners in the (KL, reward) plane, starting at the reference."""
    staircase: list[XY]
    """Steps of (FLOPs, reward), both increasing."""


class PolicyDifference(Config):
    """One policy's envelope minus another's, on the same prompts and seeds."""

    policy: str
    other: str
    area: Estimate
    """To the study's last KL, the flat ends included."""
    common_kl: float
    """KL that both policies reach, up to the study's last one; other settings might have reached further."""
    common_area: Estimate | None
    """To `common_kl`; None if one policy did not leave the reference."""
    at_kl: list[AtKl]
    """Intervals that hold jointly at all these KLs (Bonferroni)."""


class ComputeRatio(Config):
    """The compute of two policies to reach the same reward, and its ratio."""

    policy: str
    other: str
    gain_share: float
    """Share of the largest gain that both reach; it sets the target reward, in each resample separately."""
    reward: float | None
    """Target reward as measured; None if one of the policies gains nothing."""
    flops: float | None
    other_flops: float | None
    ratio: Estimate | None
    """Over the resamples in which it is defined."""
    defined: float
    """Share of resamples in which both policies gain something."""


class DiversityDifference(Config):
    """Relative difference in diversity of two policies at one setting, paired by seed."""

    policy: str
    other: str
    setting: str
    metric: str
    """"entropy", "distinct_1" or "distinct_2"."""
    relative: SeedRange
    """0.37 means 37 % more."""


class GainRatio(Config):
    """Gains of two policies over the reference at the settings that both have, and their ratio."""

    policy: str
    other: str
    settings: list[str]
    fewest_seeds: int
    gain: Estimate
    other_gain: Estimate
    relative: Estimate | None
    """0.15 means 15 % more gain. Over the resamples in which the other policy has a gain."""
    defined: float
    """Share of those resamples."""


class SuiteRow(Config):
    """A policy on a suite, at the setting with the best reward on the study's own prompts."""

    suite: str
    policy: str
    setting: str
    score: Estimate
    gain: Estimate
    """Over the reference, paired on the items."""
    seed_gains: SeedRange


class SuiteDifference(Config):
    """One policy's score on a suite minus another's, on the same items."""

    suite: str
    policy: str
    other: str
    difference: Estimate
    relative: Estimate | None
    """0.1 means a score 10 % above the other's; None where that is 0 in a resample."""
    fewest_seeds: int


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
    """Reward of the reference."""
    settings: list[SettingRow]
    policies: list[PolicySummary]
    differences: list[PolicyDifference]
    """Each pair of policies once: the earlier one in the study minus the other."""
    compute: list[ComputeRatio]
    diversity: list[DiversityDifference]
    gains: list[GainRatio]
    best_of: list[BestOfRow]
    suites: list[SuiteRow] = Field(default_factory=list, exclude_if=lambda rows: not rows)
    suite_differences: list[SuiteDifference] = Field(default_factory=list, exclude_if=lambda rows: not rows)

    def policy(self, name: str) -> PolicySummary | None:
        """The row of that policy; None if there is none."""
        return next((row for row in self.policies if row.policy == name), None)

    def rows(self, policy: str) -> list[SettingRow]:
        """The policy's settings."""
        return [row for row in self.settings if row.policy == policy]

    def difference(self, policy: str, other: str) -> PolicyDifference | None:
        """`policy` minus `other`, in whichever order the pair is stored."""
        for row in self.differences:
            if (row.policy, row.other) == (policy, other):
                return row
            if (row.policy, row.other) == (other, policy):
                at_kl = [at.model_copy(update={"reward": -at.reward}) for at in row.at_kl]
                return row.model_copy(
                    update={
                        "policy": policy,
                        "other": other,
                        "area": -row.area,
                        "common_area": -row.common_area if row.common_area else None,
                        "at_kl": at_kl,
                    }
                )
        return None
