"""Compares policies over many settings and seeds: the reward that each reaches for its KL and its compute.

    study = Study(prompts=256, points=[...], ...)     # the measurements
    summary = summarise(study)                        # estimates with their uncertainty
    verdicts = claims(study, summary)                 # which published claims they support

Needs numpy only, not torch.
"""

from dpo_core.study.claims import DOMINATES, Claim, claims
from dpo_core.study.envelopes import area, compute_to_reach, envelope, envelope_at
from dpo_core.study.results import (
    AtKl,
    BestOfRow,
    ComputeRatio,
    DiversityDifference,
    GainRatio,
    PolicyDifference,
    PolicySummary,
    SeedRange,
    SettingRow,
    StudySummary,
)
from dpo_core.study.study_data import BestOf, Point, PolicyCost, Study, best_of_kl, best_of_n
from dpo_core.study.summary import reward_at_kl, summarise

__all__ = [
    "DOMINATES",
    "AtKl",
    "BestOf",
    "BestOfRow",
    "Claim",
    "ComputeRatio",
    "DiversityDifference",
    "GainRatio",
    "Point",
    "PolicyCost",
    "PolicyDifference",
    "PolicySummary",
    "SeedRange",
    "SettingRow",
    "Study",
    "StudySummary",
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
