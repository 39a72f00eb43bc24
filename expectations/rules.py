"""Great Expectations suites, built from a `GateConfig`: this code is their source; the JSON is output.

Each expectation is a built-in one on a feature column and carries its rule's name in `meta["rule"]`.
"""

from typing import TYPE_CHECKING, Any

import pandas as pd
from pandas.api import types as kinds

from expectations.features import Subject
from expectations.thresholds import BandRule, CountRule, DistanceRule, GateConfig, RateRule

if TYPE_CHECKING:
    import great_expectations as gx

_MEND = "mend these rows, or set gate.quarantine=drop to go on without them"

# rule -> (what the offending rows do, or what is measured; what to do about it)
RULES: dict[str, tuple[str, str]] = {
    "schema": (
        "columns or types are not those of the subject",
        "write the data through the canonical reader",
    ),
    "fault": ("could not be read", _MEND),
    "type": ("hold something that is not a string in a text column", _MEND),
    "split": ("belong to neither train nor eval", "set split to train or eval in these rows"),
    "empty_prompt": ("have an empty prompt", _MEND),
    "empty_chosen": ("have an empty chosen answer", _MEND),
    "empty_rejected": ("have an empty rejected answer", _MEND),
    "empty_completion": ("have an empty completion", _MEND),
    "identical": ("have a chosen answer equal to the rejected one", _MEND),
    "identical_after_truncation": (
        "have answers that are equal within the token budget",
        "raise the token budget (max_length), or set gate.quarantine=drop to go on without these rows",
    ),
    "contradiction": (
        "are contradicted by a row that prefers the same two answers the other way round",
        "decide which order is right, or set gate.quarantine=drop to go on without both",
    ),
    "leakage": (
        "are training rows whose prompt is also in the eval split",
        "split by prompt, or set gate.quarantine=drop to take them out of the training split",
    ),
    "duplicate": ("repeat an earlier row", "remove the repeats, or make the rule critical and drop"),
    "special_tokens": (
        "hold a special token of the tokenizer in use, which would be read as a control token",
        "remove the token from the text, or set gate.quarantine=drop",
    ),
    "template": (
        "cannot be written by the chat template so that the answer continues the prompt",
        "mend the rows, set tokens.template_arguments or model.chat_template, or set gate.quarantine=drop",
    ),
    "template_tokens": (
        "hold a control token of a chat template",
        "strip the template from the source and give the bare turns",
    ),
    "control_characters": (
        "hold control characters or U+FFFD",
        "read the source in its true encoding; samples end in U+FFFD where cut inside a character",
    ),
    "prompt_repeated": (
        "have an answer that begins with the prompt",
        "cut the prompt from the answers: an answer holds only the completion",
    ),
    "over_long": ("are over the token budget and will be truncated", "raise the token budget (max_length)"),
    "length_skew": (
        "share of pairs whose chosen answer is the longer one",
        "balance the pairs by length, or use an objective less drawn to it: simpo, dpo_norm, r_dpo or ld_dpo",
    ),
    "length_ratio": (
        "median log ratio of the lengths of chosen and rejected",
        "balance the pairs by length, or use an objective less drawn to it: simpo, dpo_norm, r_dpo or ld_dpo",
    ),
    "label_balance": (
        "share of rows that are labelled desirable",
        "add rows of the rarer label; the weights of the objective make up for little of it",
    ),
    "script_drift": (
        "distance of the mix of scripts to the baseline",
        "look for a new source in another script, or take this run's profile as the new baseline",
    ),
    "language_drift": (
        "distance of the mix of languages to the baseline",
        "look for a new source in another language, or take this run's profile as the new baseline",
    ),
    "too_few": ("number of rows", "add data, or lower too_few.min_rows"),
    "dropped": ("were left out by the quarantine", "mend the source, or raise max_dropped_rate"),
}

# What a rule that several subjects share says of unpaired rows.
_SAID_OF_UNPAIRED: dict[str, tuple[str, str]] = {
    "contradiction": (
        "are contradicted by a row with the same answer and the other label",
        "decide which label is right, or set gate.quarantine=drop to go on without both",
    ),
}


def words_of(rule: str, subject: Subject) -> tuple[str, str]:
    """What the offending rows of a subject do, or what is measured; and what to do about it."""
    own = _SAID_OF_UNPAIRED if subject == "unpaired" else {}
    return own.get(rule, RULES[rule])


_COMMON = ("fault", "type", "split", "empty_prompt", "leakage", "special_tokens", "duplicate",
           "template", "template_tokens", "control_characters", "over_long", "script_drift", "language_drift",
           "too_few")  # fmt: skip
_OF_PAIRS = ("empty_chosen", "empty_rejected", "identical", "identical_after_truncation", "contradiction",
             "prompt_repeated", "length_skew", "length_ratio")  # fmt: skip
_OF_UNPAIRED = ("empty_completion", "contradiction", "prompt_repeated", "label_balance")
RULES_OF: dict[Subject, tuple[str, ...]] = {
    "prompts": _COMMON,
    "pairs": _COMMON + _OF_PAIRS,
    "unpaired": _COMMON + _OF_UNPAIRED,
}

SCHEMA: dict[Subject, dict[str, str]] = {
    "prompts": {
        "id": "text", "row": "integer", "prompt": "text", "chat": "bool", "fault": "text", "split": "text",
    },
}  # fmt: skip
SCHEMA["pairs"] = SCHEMA["prompts"] | {
    "chosen": "text", "rejected": "text", "chosen_ended": "bool", "rejected_ended": "bool",
    "agreement": "number",
}  # fmt: skip
SCHEMA["unpaired"] = SCHEMA["prompts"] | {"completion": "text", "label": "bool", "ended": "bool"}


def schema_frame(frame: pd.DataFrame, subject: Subject) -> pd.DataFrame:
    """One row that holds the kind of each column: pandas has many dtypes for one kind, all good here."""
    found: dict[str, list[str]] = {}
    for name in frame.columns:
        column = frame[name]
        wanted = SCHEMA[subject].get(str(name))
        if wanted in ("bool", "integer") and column.isna().any():
            kind = f"{column.dtype} with missing values"
        elif kinds.is_bool_dtype(column):
            kind = "bool"
        elif kinds.is_integer_dtype(column):
            kind = "number" if wanted == "number" else "integer"
        elif kinds.is_numeric_dtype(column):
            kind = "number"
        elif wanted == "text" and (kinds.is_string_dtype(column) or kinds.is_object_dtype(column)):
            kind = "text"  # single foreign values in an object column are the row-level rule `type`
        else:
            kind = str(column.dtype)
        found[str(name)] = [kind]
    return pd.DataFrame(found, index=pd.RangeIndex(1))


def schema_suite(subject: Subject, columns: list[str]) -> "gx.ExpectationSuite":
    """The columns are there (more may be) and of the right kind. Always critical: nothing works without."""
    import great_expectations as gx

    text = f"{subject}/schema"
    meta = {"rule": "schema"}
    suite: Any = gx.ExpectationSuite(name=f"{subject}-schema")
    suite.add_expectation(
        gx.expectations.ExpectTableColumnsToMatchSet(
            column_set=list(SCHEMA[subject]),
            exact_match=False,
            severity="critical",
            meta=meta,
            description=f"{text}: the columns {', '.join(SCHEMA[subject])} are there",
        )
    )
    for name, kind in SCHEMA[subject].items():
        if name in columns:
            suite.add_expectation(
                gx.expectations.ExpectColumnValuesToBeInSet(
                    column=name,
                    value_set=[kind],
                    severity="critical",
                    meta=meta,
                    description=f"{text}: column {name} is of kind {kind}",
                )
            )
    return suite


def _expectation(name: str, rule: Any, subject: Subject, boolean: bool) -> Any:
    import great_expectations as gx

    E = gx.expectations
    what = words_of(name, subject)[0]
    common = {"severity": rule.severity, "meta": {"rule": name}}
    if isinstance(rule, RateRule):
        # 1 - 0.57 is 0.43000000000000004 in floats; rounded, exactly the tolerated share still passes.
        return E.ExpectColumnValuesToBeInSet(
            column=name,
            value_set=[False] if boolean else [0.0],
            mostly=round(1 - rule.max_rate, 12),
            description=f"{subject}/{name}: at most {rule.max_rate:.2%} of the rows {what}",
            **common,
        )
    if isinstance(rule, BandRule):
        between = {
            "length_skew": E.ExpectColumnMeanToBeBetween,
            "label_balance": E.ExpectColumnMeanToBeBetween,
            "length_ratio": E.ExpectColumnMedianToBeBetween,
        }
        return between[name](
            column=name,
            min_value=rule.low,
            max_value=rule.high,
            description=f"{subject}/{name}: the {what} is between {rule.low:g} and {rule.high:g}",
            **common,
        )
    if isinstance(rule, DistanceRule):
        return E.ExpectColumnMaxToBeBetween(
            column=name,
            max_value=rule.max_distance,
            description=f"{subject}/{name}: the {what} is at most {rule.max_distance:g}",
            **common,
        )
    assert isinstance(rule, CountRule)
    return E.ExpectTableRowCountToBeBetween(
        min_value=rule.min_rows,
        description=f"{subject}/{name}: at least {rule.min_rows} rows",
        **common,
    )


def content_suite(
    subject: Subject, config: GateConfig, flags: pd.DataFrame, name: str
) -> "gx.ExpectationSuite":
    """One expectation for each rule that is on and whose feature column is in `flags`."""
    import great_expectations as gx

    suite: Any = gx.ExpectationSuite(name=name)
    for rule_name in (*RULES_OF[subject], "dropped"):
        if rule_name == "dropped":
            rule: Any = RateRule(max_rate=config.max_dropped_rate)
        else:
            rule = config.rule(rule_name)
        if rule.severity == "off" or (rule_name not in flags.columns and not isinstance(rule, CountRule)):
            continue
        boolean = rule_name in flags.columns and kinds.is_bool_dtype(flags[rule_name])
        suite.add_expectation(_expectation(rule_name, rule, subject, boolean))
    return suite
