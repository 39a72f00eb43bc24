"""Comparing ways to align at many settings and seeds: the reward each buys with KL and with compute.

    study = Study(prompts=256, points=[...], ...)     # what was measured
    summary = summarise(study)                        # estimates with their uncertainty
    verdicts = claims(study, summary)                 # what that says of published claims

Pure numpy: nothing here needs torch.
"""

from dpo_core.frontier.envelopes import area, compute_to_reach, envelope, envelope_at
from dpo_core.frontier.results import (
    ArmDifference,
    ArmRow,
    AtKl,
    BestOfRow,
    ComputeRatio,
    DiversityDifference,
    FrontierSummary,
    GainRatio,
    SeedRange,
    SettingRow,
)
from dpo_core.frontier.study import BestOf, Cost, Point, Study, best_of_kl, best_of_n
from dpo_core.frontier.summary import reward_at_kl, summarise
from dpo_core.frontier.verdicts import Claim, claims

__all__ = [
    "ArmDifference",
    "ArmRow",
    "AtKl",
    "BestOf",
    "BestOfRow",
    "Claim",
    "ComputeRatio",
    "Cost",
    "DiversityDifference",
    "FrontierSummary",
    "GainRatio",
    "Point",
    "SeedRange",
    "SettingRow",
    "Study",
    "area",
    "best_of_kl",
    "best_of_n",
    "claims",
    "compute_to_reach",
    "envelope",
    "envelope_at",
    "reward_at_kl",
    "summarise",
]
