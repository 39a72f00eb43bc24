"""The result of comparing two sets of answers to the same prompts: a win rate with its interval and cost."""

from pydantic import Field

from dpo_core.config import Config
from dpo_core.statistics.estimates import Estimate


class WinRate(Config):
    """How often the answers of `a` beat those of `b`; a tie counts one half."""

    a: str
    b: str
    judge: str
    """`sentiment`, `reward model`, or the name of the language model that judged."""
    rate: Estimate
    """Resampled by prompt."""
    wins: int = Field(ge=0)
    ties: int = Field(ge=0)
    losses: int = Field(ge=0)
    unjudged: int = Field(0, ge=0)
    """Comparisons without a usable verdict, excluded from the rates."""
    position_consistency: float | None = None
    """Share of comparisons whose verdict did not change when the answers were swapped; None if a single order
    suffices, as for a reward."""
    length_controlled: Estimate | None = None
    """The rate at equal lengths (Dubois et al. 2024), without the instructions' difficulty; None if length
    and quality cannot be separated."""
    length_a: float
    """Mean characters of an answer."""
    length_b: float
    cost: float | None = None
    """Cost of the judge for this comparison, in the currency of the configured prices."""
    requests: int = 0
    cached: int = 0
    """Judgements taken from the cache, which cost nothing."""
