"""Builds the Great Expectations suites of the data gate from a `GateConfig`.

Each expectation is a built-in one on a feature column, with its rule's name in `meta["rule"]`. The JSON that
Great Expectations writes is output; this code is the source.
"""

from typing import Any

import great_expectations as gx
import pandas as pd
from pandas.api import types as kinds

from expectations.config import GateConfig
from expectations.rules import RULES, Subject, rules_of, words_of
from expectations.thresholds import BandRule, CountRule, DistanceRule, RateRule

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
    """One row with the kind of each column; pandas has several dtypes for each kind, and all are accepted."""
    columns: dict[str, list[str]] = {}
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
            kind = "text"  # the row-level rule `type` checks single values of an object column
        else:
            kind = str(column.dtype)
        columns[str(name)] = [kind]
    return pd.DataFrame(columns, index=pd.RangeIndex(1))


def schema_suite(subject: Subject, columns: list[str]) -> gx.ExpectationSuite:
    """All columns exist (more are allowed) and have the right kind. Always critical."""
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
        between = {"mean": E.ExpectColumnMeanToBeBetween, "median": E.ExpectColumnMedianToBeBetween}
        return between[str(RULES[name].of_all)](
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
) -> gx.ExpectationSuite:
    """One expectation for each enabled rule whose feature column is in `flags`."""
    suite: Any = gx.ExpectationSuite(name=name)
    for rule_name in (*rules_of(subject), "dropped"):
        if rule_name == "dropped":
            rule: Any = RateRule(max_rate=config.max_dropped_rate)
        else:
            rule = config.rule(rule_name)
        if rule.severity == "off" or (rule_name not in flags.columns and not isinstance(rule, CountRule)):
            continue
        boolean = rule_name in flags.columns and kinds.is_bool_dtype(flags[rule_name])
        suite.add_expectation(_expectation(rule_name, rule, subject, boolean))
    return suite
