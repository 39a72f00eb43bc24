"""Whether a model may take the champion's place, and why: a rule for each reason, all of which must hold."""

from dpo_core.config import Config


class Reason(Config):
    """One rule of the decision."""

    rule: str
    """Its name in the recipe."""
    passed: bool
    text: str
    """What was measured and what was asked for, in one sentence."""


class Decision(Config):
    """The verdict on a candidate."""

    promote: bool
    candidate: str
    champion: str
    """What it was held against: a registered version, or the reference where there is no champion yet."""
    reasons: list[Reason]
    """All rules, those that failed first."""
