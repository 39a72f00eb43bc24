"""The recipe's `gate` section: `gate.<field>`, and `gate.<rule>.<threshold>` for each rule."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field, create_model

from dpo_core.config import Config
from expectations.rules import RULES
from expectations.thresholds import AnyRule, BandRule, CountRule, DistanceRule, RateRule


class _GateSettings(Config):
    """The data gate: the handling of bad rows, and the severity and threshold of each rule."""

    quarantine: Literal["refuse", "drop"] = "refuse"
    """refuse: a failed critical rule stops the run; drop: rows that break critical rules are dropped and
    counted, and the remaining rows must pass."""
    max_dropped_rate: float = Field(default=0.2, ge=0, le=1)
    """Largest share of rows that `quarantine: drop` may drop; with more, the data are refused."""
    max_candidates: int = Field(default=50_000, ge=1_000)
    """Maximum number of rows tokenised for the two token rules; with more candidates, both are estimated from
    a seeded sample of the rows."""
    baseline: str | None = Field(default=None, min_length=1)
    """The gate.json of an earlier run, for the drift rules; without it they are skipped."""
    seed: int = 0
    """Seed of the samples (token rules, language profile)."""
    echo_min_chars: int = Field(default=20, ge=1)
    """Shortest prompt, in characters, that is searched for at the start of a completion."""
    profile_rows: int = Field(default=20_000, ge=100)
    """Rows sampled for the script and language profile."""

    def rule(self, name: str) -> AnyRule:
        """The settings of a rule by its name without the subject ("contradiction", not
        "pairs/contradiction")."""
        rule = getattr(self, name)
        assert isinstance(rule, RateRule | BandRule | DistanceRule | CountRule), name
        return rule


if TYPE_CHECKING:
    GateConfig = _GateSettings
else:
    GateConfig = create_model(
        "GateConfig",
        __base__=_GateSettings,
        __doc__=_GateSettings.__doc__,
        **{
            name: (type(entry.default), Field(entry.default, description=entry.about))
            for name, entry in RULES.items()
        },
    )
