"""A number that an objective reads."""

from typing import NamedTuple


class Parameter(NamedTuple):
    """One number that an objective reads."""

    default: float
    low: float
    """The smallest allowed value, itself allowed."""
    high: float
    """The largest allowed value, itself allowed."""
    meaning: str
