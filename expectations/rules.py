"""The table of the data gate's rules: default, severity, subjects, texts and remedy of each."""

from dataclasses import dataclass
from typing import Literal

from expectations.thresholds import AnyRule, BandRule, CountRule, DistanceRule, RateRule, warn

Subject = Literal["prompts", "pairs", "unpaired"]
"""The kinds of rows that a rule applies to."""
_CORRECT = "correct these rows, or set gate.quarantine=drop to continue without them"
EVERY: tuple[Subject, ...] = ("prompts", "pairs", "unpaired")


@dataclass(frozen=True)
class RuleEntry:
    """One rule."""

    default: AnyRule
    """Default severity and threshold."""
    subjects: tuple[Subject, ...]
    about: str
    """Description for the recipe."""
    says: str
    """Predicate of the offending rows, or name of the measured value, for messages."""
    remedy: str
    of_unpaired: tuple[str, str] | None = None
    """`says` and `remedy` for unpaired rows, if they differ."""
    of_all: Literal["mean", "median"] | None = None
    """The statistic of the whole set that a band limits."""


RULES: dict[str, RuleEntry] = {
    "fault": RuleEntry(
        RateRule(),
        EVERY,
        "Rows that could not be read: a field missing, or not a string.",
        "could not be read",
        _CORRECT,
    ),
    "type": RuleEntry(
        RateRule(),
        EVERY,
        "Rows in which a text column holds something that is not a string.",
        "hold something that is not a string in a text column",
        _CORRECT,
    ),
    "split": RuleEntry(
        RateRule(),
        EVERY,
        "Rows whose split is neither train nor eval.",
        "belong to neither train nor eval",
        "set split to train or eval in these rows",
    ),
    "empty_prompt": RuleEntry(
        RateRule(),
        EVERY,
        "Prompts that are empty or whitespace only.",
        "have an empty prompt",
        _CORRECT,
    ),
    "empty_chosen": RuleEntry(
        RateRule(),
        ("pairs",),
        "Chosen answers that are empty or whitespace only.",
        "have an empty chosen answer",
        _CORRECT,
    ),
    "empty_rejected": RuleEntry(
        RateRule(),
        ("pairs",),
        "Rejected answers that are empty or whitespace only.",
        "have an empty rejected answer",
        _CORRECT,
    ),
    "empty_completion": RuleEntry(
        RateRule(),
        ("unpaired",),
        "Completions of unpaired rows that are empty or whitespace only.",
        "have an empty completion",
        _CORRECT,
    ),
    "identical": RuleEntry(
        RateRule(),
        ("pairs",),
        "Pairs whose answers are equal, surrounding whitespace aside.",
        "have a chosen answer equal to the rejected one",
        _CORRECT,
    ),
    "identical_after_truncation": RuleEntry(
        RateRule(),
        ("pairs",),
        "Pairs whose answers differ but keep the same tokens within the token budget.",
        "have answers that are equal within the token budget",
        "raise the token budget (max_length), or set gate.quarantine=drop to continue without these rows",
    ),
    "contradiction": RuleEntry(
        RateRule(),
        ("pairs", "unpaired"),
        "Pairs that are also there the other way round: A over B and B over A for one prompt. "
        "Unpaired rows that are also there with the other label.",
        "are contradicted by a row that prefers the same two answers the other way round",
        "decide which order is right, or set gate.quarantine=drop to continue without both",
        of_unpaired=(
            "are contradicted by a row with the same answer and the other label",
            "decide which label is right, or set gate.quarantine=drop to continue without both",
        ),
    ),
    "leakage": RuleEntry(
        RateRule(),
        EVERY,
        "Training rows whose prompt (letter case, width and whitespace aside) is also in the eval split.",
        "are training rows whose prompt is also in the eval split",
        "split by prompt, or set gate.quarantine=drop to take them out of the training split",
    ),
    "special_tokens": RuleEntry(
        RateRule(),
        EVERY,
        "Rows holding a special token of the tokenizer in use, or in chats a word that its template"
        " writes around turns, such as [INST]: it would be read as control.",
        "hold a special token of the tokenizer in use, which would be read as a control token",
        "remove the token from the text, or set gate.quarantine=drop",
    ),
    "template": RuleEntry(
        RateRule(),
        EVERY,
        "Rows that the chat template cannot write, or whose answer does not continue the prompt as "
        "it is written.",
        "cannot be written by the chat template so that the answer continues the prompt",
        "correct the rows, set tokens.template_arguments or model.chat_template, or set gate.quarantine=drop",
    ),
    "duplicate": RuleEntry(
        warn(0.01),
        EVERY,
        "Rows that repeat an earlier row (pairs: prompt and both answers; unpaired rows: prompt, "
        "completion and label; prompts: the prompt).",
        "repeat an earlier row",
        "remove the repeats, or make the rule critical and drop",
    ),
    "template_tokens": RuleEntry(
        warn(0.0),
        EVERY,
        "Rows holding a control token of a well-known chat template, such as <|im_start|> or "
        "[INST], or a token that the template in use writes, such as <think> or <tool_call>.",
        "hold a control token of a chat template",
        "strip the template from the source and give the bare turns",
    ),
    "control_characters": RuleEntry(
        warn(0.001),
        EVERY,
        "Rows holding a C0 or C1 control character (tab, line feed and carriage return aside) or U+FFFD.",
        "hold control characters or U+FFFD",
        "read the source in its true encoding; samples end in U+FFFD where cut inside a character",
    ),
    "prompt_repeated": RuleEntry(
        warn(0.01),
        ("pairs", "unpaired"),
        "Rows in which an answer begins with its prompt (chat: with the first or last message).",
        "have an answer that begins with the prompt",
        "cut the prompt from the answers: an answer holds only the completion",
    ),
    "over_long": RuleEntry(
        warn(0.05),
        EVERY,
        "Rows whose tokens exceed the budget, so that they are truncated.",
        "are over the token budget and will be truncated",
        "raise the token budget (max_length)",
    ),
    "length_skew": RuleEntry(
        BandRule(severity="warning", low=0.2, high=0.8),
        ("pairs",),
        "Share of pairs whose chosen answer is the longer one; a tie counts one half.",
        "share of pairs whose chosen answer is the longer one",
        "balance the pairs by length, or use an objective less drawn to it: simpo, dpo_norm, r_dpo or ld_dpo",
        of_all="mean",
    ),
    "length_ratio": RuleEntry(
        BandRule(severity="warning", low=-0.5, high=0.5),
        ("pairs",),
        "Median over pairs of log(characters of chosen / characters of rejected).",
        "median log ratio of the lengths of chosen and rejected",
        "balance the pairs by length, or use an objective less drawn to it: simpo, dpo_norm, r_dpo or ld_dpo",
        of_all="median",
    ),
    "label_balance": RuleEntry(
        BandRule(severity="warning", low=0.05, high=0.95),
        ("unpaired",),
        "Share of unpaired rows that are labelled desirable: with one class only, there is nothing "
        "to tell apart.",
        "share of rows that are labelled desirable",
        "add rows of the rarer label; the weights of the objective make up for little of it",
        of_all="mean",
    ),
    "script_drift": RuleEntry(
        DistanceRule(severity="warning"),
        EVERY,
        "Distance of the distribution of letters over Unicode scripts to the baseline's.",
        "distance of the mix of scripts to the baseline",
        "look for a new source in another script, or take this run's profile as the new baseline",
    ),
    "language_drift": RuleEntry(
        DistanceRule(severity="warning", max_distance=0.15),
        EVERY,
        "Distance of the distribution of rows over guessed languages to the baseline's.",
        "distance of the mix of languages to the baseline",
        "look for a new source in another language, or take this run's profile as the new baseline",
    ),
    "too_few": RuleEntry(
        CountRule(severity="warning"),
        EVERY,
        "Number of rows, after quarantine.",
        "number of rows",
        "add data, or lower too_few.min_rows",
    ),
}

_ALWAYS = {
    "schema": (
        "columns or types are not those of the subject",
        "write the data through the canonical reader",
    ),
    "dropped": ("were left out by the quarantine", "correct the source, or raise max_dropped_rate"),
}
"""Rules that the recipe cannot set."""


def rules_of(subject: Subject) -> list[str]:
    """The rules for a subject."""
    return [name for name, entry in RULES.items() if subject in entry.subjects]


def words_of(rule: str, subject: Subject) -> tuple[str, str]:
    """The texts `says` and `remedy` of a rule for a subject."""
    if rule in _ALWAYS:
        return _ALWAYS[rule]
    entry = RULES[rule]
    if subject == "unpaired" and entry.of_unpaired:
        return entry.of_unpaired
    return entry.says, entry.remedy
