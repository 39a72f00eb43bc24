"""Preference objectives: one definition each, found by name, used by every path.

    objective = get("dpo")
    parameters = objective.resolve({"beta": 0.1})
    loss = objective.function(PairLogps(...), **parameters).mean()

A new family is a new file beside `pairs.py` that registers its functions and is imported below.
"""

from dpo_core.objectives.pairs import PairLogps, pair_metrics
from dpo_core.objectives.registry import Objective, Parameter, get, names, objective

__all__ = ["Objective", "PairLogps", "Parameter", "get", "names", "objective", "pair_metrics"]
