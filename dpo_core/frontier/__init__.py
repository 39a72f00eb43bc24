"""Comparing ways to align at many settings and seeds: the reward each buys with KL and with compute.

    study = Study(prompts=256, points=[...], ...)     # what was measured
    summary = summarise(study)                        # estimates with their uncertainty
    verdicts = claims(study, summary)                 # what that says of published claims

Pure numpy: nothing here needs torch.
"""

from dpo_core.frontier.envelope import area, compute_to_reach, envelope, envelope_at
from dpo_core.frontier.study import BestOf, Cost, Point, Study, best_of_kl, best_of_n

__all__ = [
    "BestOf",
    "Cost",
    "Point",
    "Study",
    "area",
    "best_of_kl",
    "best_of_n",
    "compute_to_reach",
    "envelope",
    "envelope_at",
]
