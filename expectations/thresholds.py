"""Thresholds of the data gate: one field a rule, all settable from the recipe (`gate.<rule>.<threshold>`)."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from dpo_core.config import Config

# YAML reads a bare `off` as false.
Severity = Annotated[
    Literal["critical", "warning", "off"], BeforeValidator(lambda given: "off" if given is False else given)
]


class Rule(Config):
    """What every rule has."""

    severity: Severity = "critical"
    """critical: a failure refuses the data; warning: it is shown on the page; off: not checked."""


class RateRule(Rule):
    """A rule on single rows: the share of offending rows may not exceed `max_rate`."""

    max_rate: float = Field(default=0.0, ge=0, le=1)
    """Largest tolerated share of offending rows, 0 to 1."""

    @property
    def threshold(self) -> dict[str, float]:
        return {"max_rate": self.max_rate}


class BandRule(Rule):
    """A rule on one number of the whole set: it must lie in [`low`, `high`]."""

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


def _warn(max_rate: float) -> RateRule:
    return RateRule(severity="warning", max_rate=max_rate)


class GateConfig(Config):
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

    fault: RateRule = RateRule()
    """Rows that could not be read: a field missing, or not a string."""
    type: RateRule = RateRule()
    """Rows in which a text column holds something that is not a string."""
    split: RateRule = RateRule()
    """Rows whose split is neither train nor eval."""
    empty_prompt: RateRule = RateRule()
    """Prompts that are empty or whitespace only."""
    empty_chosen: RateRule = RateRule()
    """Chosen answers that are empty or whitespace only."""
    empty_rejected: RateRule = RateRule()
    """Rejected answers that are empty or whitespace only."""
    empty_completion: RateRule = RateRule()
    """Completions of unpaired rows that are empty or whitespace only."""
    identical: RateRule = RateRule()
    """Pairs whose answers are equal, surrounding whitespace aside."""
    identical_after_truncation: RateRule = RateRule()
    """Pairs whose answers differ but keep the same tokens within the token budget."""
    contradiction: RateRule = RateRule()
    """Pairs that are also there the other way round: A over B and B over A for one prompt. Unpaired rows
    that are also there with the other label."""
    leakage: RateRule = RateRule()
    """Training rows whose prompt (letter case, width and whitespace aside) is also in the eval split."""
    special_tokens: RateRule = RateRule()
    """Rows holding a special token of the tokenizer in use, or in chats a word that its template writes
    around turns, such as [INST]: it would be read as control."""
    template: RateRule = RateRule()
    """Rows that the chat template cannot write, or whose answer does not continue the prompt as it is
    written."""
    duplicate: RateRule = _warn(0.01)
    """Rows that repeat an earlier row (pairs: prompt and both answers; unpaired rows: prompt, completion and
    label; prompts: the prompt)."""
    template_tokens: RateRule = _warn(0.0)
    """Rows holding a control token of a well-known chat template, such as <|im_start|> or [INST], or a token
    that the template in use writes, such as <think> or <tool_call>."""
    control_characters: RateRule = _warn(0.001)
    """Rows holding a C0 or C1 control character (tab, line feed and carriage return aside) or U+FFFD."""
    prompt_repeated: RateRule = _warn(0.01)
    """Rows in which an answer begins with its prompt (chat: with the first or last message)."""
    over_long: RateRule = _warn(0.05)
    """Rows whose tokens exceed the budget, so that they are truncated."""
    length_skew: BandRule = BandRule(severity="warning", low=0.2, high=0.8)
    """Share of pairs whose chosen answer is the longer one; a tie counts one half."""
    length_ratio: BandRule = BandRule(severity="warning", low=-0.5, high=0.5)
    """Median over pairs of log(characters of chosen / characters of rejected)."""
    label_balance: BandRule = BandRule(severity="warning", low=0.05, high=0.95)
    """Share of unpaired rows that are labelled desirable: with one class only, there is nothing to tell
    apart."""
    script_drift: DistanceRule = DistanceRule(severity="warning")
    """Distance of the distribution of letters over Unicode scripts to the baseline's."""
    language_drift: DistanceRule = DistanceRule(severity="warning", max_distance=0.15)
    """Distance of the distribution of rows over guessed languages to the baseline's."""
    too_few: CountRule = CountRule(severity="warning")
    """Number of rows, after quarantine."""

    @model_validator(mode="before")
    @classmethod
    def _keep_defaults(cls, given: Any) -> Any:
        """Lays `{max_rate: 0.01}` over the rule's own defaults, so that a warning stays a warning."""
        if not isinstance(given, dict):
            return given
        merged = dict(given)
        for name, value in given.items():
            field = cls.model_fields.get(name)
            if field is not None and isinstance(value, dict) and isinstance(field.default, Rule):
                merged[name] = field.default.model_dump() | value
        return merged

    def rule(self, name: str) -> AnyRule:
        """The rule called `name`, without the subject ("contradiction", not "pairs/contradiction")."""
        found = getattr(self, name)
        assert isinstance(found, RateRule | BandRule | DistanceRule | CountRule), name
        return found
