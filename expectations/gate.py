"""The data gate: validates prompts, preference pairs or unpaired rows, and refuses, drops or passes them.

Every finding's result, count and rows are read from a Great Expectations validation result, which is also
written as Data Docs (static HTML).
"""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import great_expectations as gx
import numpy as np
import pandas as pd
from great_expectations.data_context.types.base import DataContextConfig, InMemoryStoreBackendDefaults

from expectations.config import GateConfig
from expectations.drift import Profile, distance, profile, read_profile
from expectations.features import TEXTS, Features, Tokenisation, compute, relations
from expectations.report import Finding, GateReport, to_do
from expectations.rules import Subject, rules_of, words_of
from expectations.suite import SCHEMA, content_suite, schema_frame, schema_suite
from expectations.thresholds import BandRule, DistanceRule, RateRule, Severity
from expectations.token_rules import template_flags, token_flags

_ROWS_SHOWN = 10
# Great Expectations keeps its current project in a global variable, so gates in threads must take turns.
_ONE_AT_A_TIME = threading.Lock()


class _Expectations:
    """A Great Expectations project in memory, whose Data Docs are written to `folder`."""

    def __init__(self, folder: Path) -> None:
        site = {
            "class_name": "SiteBuilder",
            "store_backend": {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(folder)},
            "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
        }
        config = DataContextConfig(
            store_backend_defaults=InMemoryStoreBackendDefaults(init_temp_docs_sites=False),
            data_docs_sites={"data_docs": site},
            analytics_enabled=False,
            progress_bars={"globally": False, "metric_calculations": False},
        )
        self.context: Any = gx.get_context(mode="ephemeral", project_config=config)
        self.index = folder / "index.html"

    def run(self, suite: Any, frame: pd.DataFrame) -> list[dict[str, Any]]:
        """Validate `frame` against `suite`, and return the results as plain dicts."""
        name = suite.name
        context = self.context
        asset = context.data_sources.add_pandas(name).add_dataframe_asset(name)
        batch = asset.add_batch_definition_whole_dataframe("all")
        definition = gx.ValidationDefinition(name=name, data=batch, suite=context.suites.add(suite))
        outcome = context.validation_definitions.add(definition).run(
            batch_parameters={"dataframe": frame}, result_format={"result_format": "SUMMARY"}
        )
        return [result.to_json_dict() for result in outcome.results]

    def write_docs(self) -> None:
        """Write what was validated as HTML."""
        self.context.build_data_docs()


def _exception(result: dict[str, Any]) -> str:
    """The message of an expectation that could not be evaluated, or ""."""
    info = result.get("exception_info") or {}
    for entry in [info, *(v for v in info.values() if isinstance(v, dict))]:
        if entry.get("raised_exception"):
            return str(entry.get("exception_message"))
    return ""


def _finding(result: dict[str, Any], subject: Subject, config: GateConfig, notes: dict[str, str]) -> Finding:
    """The finding of one validation result; `notes` has texts in brackets for rules' messages."""
    name = result["expectation_config"]["meta"]["rule"]
    severity: Severity = result["expectation_config"]["severity"]
    rule = RateRule(max_rate=config.max_dropped_rate) if name == "dropped" else config.rule(name)
    what, remedy = words_of(name, subject)
    passed = bool(result["success"])
    values = result["result"]
    count, rate, observed, rows = 0, 0.0, None, []
    if broken := _exception(result):
        passed, text = False, f"the expectation could not be evaluated ({broken})"
    elif isinstance(rule, RateRule):
        judged = values["element_count"] - values.get("missing_count", 0)
        count = int(values["unexpected_count"])
        rate = count / judged if judged else 0.0
        rows = [int(at) for at in values.get("partial_unexpected_index_list") or []][:_ROWS_SHOWN]
        text = f"{count} of {judged} rows ({rate:.2%}) {what}; tolerated {rule.max_rate:.2%}"
        if count and name in notes:
            text += f" ({notes[name]})"
        if rows:
            text += f"; source rows {', '.join(map(str, rows))}{', …' if count > len(rows) else ''}"
    else:
        observed = float(values["observed_value"])
        if isinstance(rule, BandRule):
            text = f"the {what} is {observed:.3f}, accepted {rule.low:g} to {rule.high:g}"
        elif isinstance(rule, DistanceRule):
            text = f"the {what} is {observed:.3f}, accepted up to {rule.max_distance:g}"
        else:
            text = f"the {what} is {observed:.0f}, at least {rule.min_rows} are needed"
    remedy = "" if passed else remedy
    return Finding(
        rule=f"{subject}/{name}",
        severity=severity,
        passed=passed,
        count=count,
        rate=rate,
        observed=observed,
        threshold=rule.threshold,
        rows=rows,
        message=text + to_do(remedy),
        remedy=remedy,
    )


def _schema_finding(results: list[dict[str, Any]], subject: Subject) -> Finding:
    wrong = []
    for result in results:
        if result["success"]:
            continue
        kwargs, values = result["expectation_config"]["kwargs"], result["result"]
        if "column" in kwargs:
            is_now = (values.get("partial_unexpected_list") or ["unknown"])[0]
            wrong.append(f"column {kwargs['column']} is {is_now}, not {kwargs['value_set'][0]}")
        else:
            absent = [c for c in SCHEMA[subject] if c not in values["observed_value"]]
            wrong.append(f"missing: {', '.join(absent)}")
    remedy = words_of("schema", subject)[1] if wrong else ""
    return Finding(
        rule=f"{subject}/schema",
        severity="critical",
        passed=not wrong,
        count=len(wrong),
        message=("; ".join(wrong) or "all columns are there and of the right type") + to_do(remedy),
        remedy=remedy,
    )


def _skipped(
    subject: Subject, config: GateConfig, flags: pd.DataFrame, reasons: dict[str, str]
) -> list[Finding]:
    """A finding for each enabled rule without a feature column in this run."""
    return [
        Finding(
            rule=f"{subject}/{name}",
            severity=config.rule(name).severity,
            passed=True,
            skipped=True,
            threshold=config.rule(name).threshold,
            message=f"not judged: {reasons[name]}",
        )
        for name in rules_of(subject)
        if name in reasons and name not in flags.columns and config.rule(name).severity != "off"
    ]


def _critical_hits(
    flags: pd.DataFrame, keys: pd.DataFrame, subject: Subject, config: GateConfig
) -> pd.DataFrame:
    """The rows that the quarantine drops, one boolean column a critical row-level rule."""
    names = [
        name
        for name in rules_of(subject)
        if name in flags and isinstance(rule := config.rule(name), RateRule) and rule.severity == "critical"
    ]
    hits = pd.DataFrame({name: flags[name].to_numpy() == 1 for name in names}, index=keys.index)
    if "duplicate" in hits:
        # The first of several equal rows stays unless another rule drops it, so find duplicates afterwards.
        stay = ~hits.drop(columns="duplicate").any(axis=1)
        hits["duplicate"] = False
        hits.loc[stay, "duplicate"] = relations(keys[stay], subject)["duplicate"]
    return hits


def _reasons(fault: pd.Series) -> str:
    """The two most common reasons why rows could not be read, with their counts."""
    common = fault[fault.fillna("") != ""].value_counts().head(2)
    return "; ".join(f"{count}: {reason}" for reason, count in common.items())


class _Judge:
    """Validates one data set, before and after the quarantine."""

    def __init__(
        self, subject: Subject, config: GateConfig, docs: _Expectations, baseline: Profile | None
    ) -> None:
        self.subject, self.config, self.docs, self.baseline = subject, config, docs, baseline
        self.notes: dict[str, str] = {}
        self.reasons: dict[str, str] = {}

    def run(
        self, frame: pd.DataFrame, flags: pd.DataFrame, usable: Any, name: str
    ) -> tuple[list[Finding], Profile]:
        """Add the columns about the whole set, run the suite, and return its findings."""
        columns, config = TEXTS[self.subject], self.config
        seen = profile(frame, usable, columns, rows=config.profile_rows, seed=config.seed)
        reasons = dict(self.reasons)
        if self.baseline is None:
            reasons |= dict.fromkeys(
                ("script_drift", "language_drift"),
                "no baseline was given; this run's profile can serve as the next one's",
            )
        else:
            flags = flags.assign(
                script_drift=distance(seen.scripts, self.baseline.scripts),
                language_drift=distance(seen.languages, self.baseline.languages),
            )
        empty = [c for c in flags.columns if flags[c].isna().all()]  # such as no usable pair
        reasons |= dict.fromkeys(empty, "no row could be measured")
        flags = flags.drop(columns=empty)
        notes = self.notes | {"fault": _reasons(frame["fault"])}
        results = self.docs.run(content_suite(self.subject, self.config, flags, name), flags)
        findings = [_finding(result, self.subject, self.config, notes) for result in results]
        return findings + _skipped(self.subject, self.config, flags, reasons), seen


def judge(
    frame: pd.DataFrame,
    *,
    subject: Subject,
    config: GateConfig,
    docs_dir: Path,
    tokenisation: Tokenisation | None = None,
    baseline: dict[str, object] | None = None,
    tick: Callable[[int], None] | None = None,
) -> tuple[GateReport, pd.DataFrame]:
    """Validate a frame of canonical prompts, pairs or unpaired rows.

    Args:
        frame: one row per example; columns as in `expectations.suite.SCHEMA`, more are allowed.
        docs_dir: folder for the Data Docs; nothing is written elsewhere.
        tokenisation: the tokenizer, its template and the token budget, if known.
        baseline: the `profile` of an earlier report, for the drift rules.
        tick: called with the number of rows whose features are done, for a progress bar.

    Returns:
        The report and the rows that pass (all rows unless the quarantine dropped some).

    Raises:
        DataError: the baseline is not a profile. A refusal is not raised: see `GateReport.raise_if_refused`.
    """
    earlier = None if baseline is None else read_profile(baseline)
    tokenisation = tokenisation or Tokenisation()
    with _ONE_AT_A_TIME:
        judged = _Judge(subject, config, _Expectations(Path(docs_dir)), earlier)
        outcome = _judge(frame, judged, tokenisation, tick)
        judged.docs.write_docs()
    return outcome


def _judge(
    frame: pd.DataFrame, judged: _Judge, tokenisation: Tokenisation, tick: Callable[[int], None] | None
) -> tuple[GateReport, pd.DataFrame]:
    subject, config, docs = judged.subject, judged.config, judged.docs
    kinds = schema_frame(frame, subject)
    schema = _schema_finding(docs.run(schema_suite(subject, list(kinds.columns)), kinds), subject)
    if not schema.passed:
        return _report(subject, len(frame), docs, [schema], Profile()), frame
    features = compute(
        frame, subject, tokenisation=tokenisation, echo_min_chars=config.echo_min_chars, tick=tick
    )
    usable = features.keys["usable"].to_numpy()
    flags = _with_token_columns(frame, features, tokenisation, judged)
    if config.quarantine == "refuse":
        findings, seen = judged.run(frame, flags, usable, subject)
        return _report(subject, len(frame), docs, [schema, *findings], seen), frame
    return _quarantine(frame, flags, features, judged, schema)


def _with_token_columns(
    frame: pd.DataFrame, features: Features, tokenisation: Tokenisation, judged: _Judge
) -> pd.DataFrame:
    """The features with those that need the tokenizer, as far as it is known."""
    flags, config, subject = features.flags, judged.config, judged.subject
    if tokenisation.tokens is None or tokenisation.limit(subject) is None:
        without = "no tokenizer or token budget was given"
        judged.reasons = dict.fromkeys(("over_long", "identical_after_truncation"), without)
    else:
        columns, estimated = token_flags(
            frame,
            features,
            tokenisation,
            subject,
            max_candidates=config.max_candidates,
            seed=config.seed,
        )
        flags = flags.assign(**columns)
        judged.notes = {name: f"estimated from {n} rows" for name, n in estimated.items()}
    if tokenisation.tokens is not None:
        refused, why = template_flags(frame, features.keys["usable"].to_numpy(), tokenisation.tokens)
        flags = flags.assign(template=refused)
        judged.notes |= {"template": why}
    if not tokenisation.special_tokens:
        flags = flags.drop(columns="special_tokens")
        judged.reasons["special_tokens"] = "no tokenizer was given"
    return flags


def _quarantine(
    frame: pd.DataFrame, flags: pd.DataFrame, features: Features, judged: _Judge, schema: Finding
) -> tuple[GateReport, pd.DataFrame]:
    """Validate, drop the rows that break critical rules, and validate the remaining rows."""
    subject, keys = judged.subject, features.keys
    hits = _critical_hits(flags, keys, subject, judged.config)
    out = hits.any(axis=1).to_numpy()
    usable = keys["usable"].to_numpy()
    before, seen = judged.run(frame, flags.assign(dropped=out), usable, subject)
    if not out.any():
        return _report(subject, len(frame), judged.docs, [schema, *before], seen), frame
    share = [f for f in before if f.rule == f"{subject}/dropped"]
    kept = frame[~out].reset_index(drop=True)
    again = flags[~out].assign(**relations(keys[~out], subject))
    findings, seen = judged.run(kept, again, usable[~out], f"{subject}-after-quarantine")
    report = _report(subject, len(frame), judged.docs, [schema, *share, *findings], seen)
    counts = {f"{subject}/{name}": int(n) for name, n in hits.sum().items() if n}
    return report.model_copy(
        update={"dropped": int(np.sum(out)), "dropped_by": counts, "before": before}
    ), kept


def _report(
    subject: Subject, rows: int, docs: _Expectations, findings: list[Finding], seen: Profile
) -> GateReport:
    refused = any(f.severity == "critical" and not f.passed for f in findings)
    return GateReport(
        subject=subject,
        rows=rows,
        refused=refused,
        findings=findings,
        docs_index=str(docs.index),
        profile=seen,
    )
