"""Ensembles of rewards: "0.7 * mine.py:detector + 0.3 * http://host:8000/score", a sum of weighted z-scores.

Rewards have different scales, and a raw sum would follow the one with the largest. So each is first z-scored
within the group of a prompt's samples: less their mean, divided by their deviation. An ensemble therefore
orders the samples of one prompt, and says nothing of a sample alone or of other prompts: its mean over a
group is 0.
"""

import math
import re
import statistics
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

from dpo_core.errors import RecipeError

_PLUS = re.compile(r"\s+\+\s+")
_TERM = re.compile(r"(?P<weight>\S+)\s+\*\s+(?P<source>\S.*)")


class Part(NamedTuple):
    """A reward of an ensemble."""

    weight: float
    source: str
    """As in `reward.source`."""


def is_ensemble(source: str) -> bool:
    """Whether a reward's source is the weighted sum of several."""
    return bool(_PLUS.search(source))


def parts(source: str) -> list[Part]:
    """The rewards of an ensemble, or the only one with weight 1.

    Raises:
        RecipeError: a term of a sum is not a weight and a source.
    """
    if not is_ensemble(source):
        return [Part(1.0, source)]
    return [_part(term, source) for term in _PLUS.split(source.strip())]


def _part(term: str, source: str) -> Part:
    found = _TERM.fullmatch(term)
    try:
        weight = float(found["weight"]) if found else 0.0
    except ValueError:
        weight = 0.0
    if found is None or not weight or not math.isfinite(weight):
        raise RecipeError(
            f"'{term}' in the reward '{source}' is not a weight and a reward",
            "Write an ensemble as '0.7 * mine.py:score + 0.3 * http://host:port/path', with weights that are "
            "not 0",
        )
    return Part(weight, found["source"])


def combine(
    rewards: Sequence[Sequence[float]], weights: Sequence[float], prompts: Sequence[str]
) -> list[float]:
    """The weighted sum of each sample's z-scores.

    Args:
        rewards: those of each part, one a sample.
        prompts: the prompt of each sample; the samples of a prompt stand together and are its group.
    """
    totals: list[float] = []
    for _, group in groupby(range(len(prompts)), key=prompts.__getitem__):
        places = list(group)
        columns = [_z_scores([part[i] for i in places]) for part in rewards]
        totals += [
            math.fsum(weight * z for weight, z in zip(weights, row, strict=True))
            for row in zip(*columns, strict=True)
        ]
    return totals


def _z_scores(values: Sequence[float]) -> list[float]:
    """0 for all where they are equal."""
    if max(values) == min(values):
        return [0.0] * len(values)
    mean, deviation = statistics.fmean(values), statistics.pstdev(values)
    return [(value - mean) / deviation for value in values]
