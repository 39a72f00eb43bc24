"""The kinds of rules of the data gate by their thresholds: rate, band, distance and count."""

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from dpo_core.config import Config

# YAML reads a bare `off` as false.
Severity = Annotated[
    Literal["critical", "warning", "off"], BeforeValidator(lambda value: "off" if value is False else value)
]


class Rule(Config):
    """Settings common to all rules."""

    severity: Severity = "critical"
    """critical: a failure refuses the data; warning: a failure is shown on the page; off: not checked."""


class RateRule(Rule):
    """A rule on single rows: the share of offending rows must not exceed `max_rate`."""

    max_rate: float = Field(default=0.0, ge=0, le=1)
    """Largest tolerated share of offending rows, 0 to 1."""

    @property
    def threshold(self) -> dict[str, float]:
        return {"max_rate": self.max_rate}


class BandRule(Rule):
    """A rule on a statistic of the whole set: it must be in [`low`, `high`]."""

    low: float
    """Smallest accepted value."""
    high: float
    """Largest accepted value."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"low ({self.low}) is above high ({self.high})")
        return self

    @property
    def threshold(self) -> dict[str, float]:
        return {"low": self.low, "high": self.high}


class DistanceRule(Rule):
    """A rule on the distance to the baseline's distribution."""

    max_distance: float = Field(default=0.1, ge=0, le=1)
    """Largest tolerated total-variation distance, 0 (same) to 1 (disjoint)."""

    @property
    def threshold(self) -> dict[str, float]:
        return {"max_distance": self.max_distance}


class CountRule(Rule):
    """A rule on the number of rows."""

    min_rows: int = Field(default=20, ge=1)
    """Smallest accepted number of rows."""

    @property
    def threshold(self) -> dict[str, float]:
        return {"min_rows": float(self.min_rows)}


AnyRule = RateRule | BandRule | DistanceRule | CountRule


def warn(max_rate: float) -> RateRule:
    return RateRule(severity="warning", max_rate=max_rate)
