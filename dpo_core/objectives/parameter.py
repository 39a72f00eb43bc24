"""`Parameter`, the declaration of a number that an objective reads."""

from typing import NamedTuple


class Parameter(NamedTuple):
    """A number that an objective reads, with its inclusive range."""

    default: float
    low: float
    high: float
    meaning: str
