"""Alignment objectives, each defined once and used by name.

    objective = get("dpo")
    parameters = objective.resolve({"beta": 0.1})
    loss = objective.function(PairLogps(...), **parameters).mean()

A new family is a new file beside `pairs.py` that registers its functions.
"""

import sys

from dpo_core.objectives.inputs import PairLogps, Totals, UnpairedLogps
from dpo_core.objectives.metrics import class_means, pair_metrics, unpaired_metrics, wpo_weights
from dpo_core.objectives.parameter import Parameter
from dpo_core.objectives.registry import Objective, ObjectiveName, Term, combine, get, names, objective
from dpo_core.objectives.unpaired import z0
from dpo_core.objectives.variants import VARIANTS, Variant
from dpo_core.system import import_modules

import_modules(sys.modules[__name__])  # a family registers its functions when it is imported

__all__ = [
    "VARIANTS",
    "Objective",
    "ObjectiveName",
    "PairLogps",
    "Parameter",
    "Term",
    "Totals",
    "UnpairedLogps",
    "Variant",
    "class_means",
    "combine",
    "get",
    "names",
    "objective",
    "pair_metrics",
    "unpaired_metrics",
    "wpo_weights",
    "z0",
]
