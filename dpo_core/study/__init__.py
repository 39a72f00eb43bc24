"""Compares policies over many settings and seeds: the reward that each reaches for its KL and its compute.

    study = Study(prompts=256, points=[...], ...)     # the measurements
    summary = summarise(study)                        # estimates with their uncertainty
    verdicts = claims(study, summary)                 # which published claims they support

Needs numpy only, not torch.
"""

from dpo_core.study.claims import DOMINATES, Claim, claims
from dpo_core.study.results import AtKl, PolicySummary, SettingRow, StudySummary
from dpo_core.study.study_data import BestOf, Point, PolicyCost, Study, best_of_n
from dpo_core.study.summary import summarise

__all__ = [
    "DOMINATES", "AtKl", "BestOf", "Claim", "Point", "PolicyCost", "PolicySummary", "SettingRow", "Study",
    "StudySummary", "best_of_n", "claims", "summarise",
]  # fmt: skip
