"""What the recipe says about the data gate: `gate.<field>`, and `gate.<rule>.<threshold>` for each rule."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field, create_model

from dpo_core.config import Config
from expectations.rules import RULES
from expectations.thresholds import AnyRule, BandRule, CountRule, DistanceRule, RateRule


class _GateSettings(Config):
    """The data gate: what to do with bad rows, and the severity and threshold of each rule."""

    quarantine: Literal["refuse", "drop"] = "refuse"
    """refuse: a critical failure stops the run; drop: rows hit by critical rules are left out and counted,
    and what is left must pass."""
    max_dropped_rate: float = Field(default=0.2, ge=0, le=1)
    """Largest share of rows that `quarantine: drop` may leave out before the data is refused after all."""
    max_candidates: int = Field(default=50_000, ge=1_000)
    """Rows that may be tokenised for the two token rules; with more candidates, both are estimated from a
    seeded sample of the rows."""
    baseline: str | None = Field(default=None, min_length=1)
    """An earlier run's gate.json, for the drift rules; without one they are skipped."""
    seed: int = 0
    """Seed of the samples (token rules, language profile)."""
    echo_min_chars: int = Field(default=20, ge=1)
    """A prompt shorter than this many characters is not looked for at the start of a completion."""
    profile_rows: int = Field(default=20_000, ge=100)
    """Rows sampled for the script and language profile."""

    def rule(self, name: str) -> AnyRule:
        """The rule called `name`, without the subject ("contradiction", not "pairs/contradiction")."""
        found = getattr(self, name)
        assert isinstance(found, RateRule | BandRule | DistanceRule | CountRule), name
        return found


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
