"""Verdicts: severities, thresholds, quarantine, the error, the report and its Data Docs."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from pydantic import ValidationError

from dpo_core.data.config import DataConfig
from dpo_core.data.load import load
from dpo_core.data.split import split_by_prompt
from dpo_core.errors import DataError, GateRefused
from expectations.config import GateConfig
from expectations.gate import judge
from expectations.report import GateReport
from expectations.thresholds import CountRule, RateRule
from tests.support.frames import clean_pairs, failed, row_number

Gate = Callable[..., tuple[GateReport, pd.DataFrame]]
DROP = GateConfig(quarantine="drop")


def settings(**rules: Any) -> GateConfig:
    return GateConfig.model_validate(rules)


def broken(rows: int = 40) -> pd.DataFrame:
    """One empty answer (row 7), one contradiction (8, 9), one leak (11): four rows to drop."""
    frame = clean_pairs(rows)
    frame.loc[7, "rejected"] = ""
    frame.loc[9, ["prompt", "chosen", "rejected"]] = frame.loc[8, ["prompt", "rejected", "chosen"]].to_numpy()
    frame.loc[11, "prompt"] = frame.loc[10, "prompt"].upper()
    return frame


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> GateReport:
    """The report on `broken()`."""
    docs = tmp_path_factory.mktemp("refused")
    return judge(broken(), subject="pairs", config=GateConfig(), docs_dir=docs)[0]


@pytest.fixture(scope="module")
def dropped(tmp_path_factory: pytest.TempPathFactory) -> tuple[GateReport, pd.DataFrame]:
    """The report on `broken()`, and the rows that are left, if its faults are dropped."""
    return judge(broken(), subject="pairs", config=DROP, docs_dir=tmp_path_factory.mktemp("dropped"))


def test_refuse_names_rule_count_rate_rows_and_remedy(refused: GateReport) -> None:
    report = refused
    assert set(failed(report)) == {"empty_rejected", "contradiction", "leakage"}
    with pytest.raises(GateRefused) as caught:
        report.raise_if_refused()
    said = str(pickle.loads(pickle.dumps(caught.value)))
    assert "pairs/contradiction: 2 of 40 rows (5.00%)" in said
    assert f"source rows {row_number(8)}, {row_number(9)}" in said
    assert "gate.quarantine=drop" in said
    assert report.docs_index in said
    assert "\n" not in said
    assert caught.value.exit_code == 3


def test_drop_leaves_out_the_hit_rows_and_goes_on(
    refused: GateReport, dropped: tuple[GateReport, pd.DataFrame]
) -> None:
    report, kept = dropped
    report.raise_if_refused()
    assert (report.rows, report.dropped) == (40, 4)
    assert report.dropped_by == {
        "pairs/empty_rejected": 1,
        "pairs/contradiction": 2,
        "pairs/leakage": 1,
    }
    assert kept["row"].tolist() == [row_number(i) for i in range(40) if i not in (7, 8, 9, 11)]
    assert list(kept.index) == list(range(36))
    assert not failed(report)
    assert {f.rule for f in report.before if not f.passed} == {f"pairs/{n}" for n in failed(refused)}
    # Of a leak the row of the eval split stays.
    assert row_number(10) in set(kept["row"])
    assert kept["split"].eq("eval").sum() == 8


def test_drop_refuses_when_it_drops_too_much(gate: Gate) -> None:
    report, _ = gate(broken(), config=DROP.model_copy(update={"max_dropped_rate": 0.09}))
    assert set(failed(report)) == {"dropped"}
    assert failed(report)["dropped"].count == 4
    with pytest.raises(GateRefused, match="max_dropped_rate"):
        report.raise_if_refused()


def test_drop_refuses_when_it_leaves_too_few(gate: Gate) -> None:
    strict = DROP.model_copy(update={"too_few": CountRule()})
    report, _ = gate(broken(23), config=strict)
    assert set(failed(report)) == {"too_few"}
    assert failed(report)["too_few"].observed == 19
    assert report.refused


def test_drop_with_nothing_to_drop_returns_the_frame(gate: Gate) -> None:
    frame = clean_pairs()
    report, kept = gate(frame, config=DROP)
    assert kept is frame
    assert (report.dropped, report.before, report.refused) == (0, [], False)


def test_dropping_duplicates_keeps_the_first_that_is_sound(gate: Gate) -> None:
    frame = clean_pairs()
    for twin in (12, 13):
        frame.loc[twin, ["prompt", "chosen", "rejected"]] = frame.loc[6, ["prompt", "chosen", "rejected"]]
    frame.loc[6, "split"] = "nowhere"  # the first of the three goes for another reason
    report, kept = gate(frame, config=settings(quarantine="drop", duplicate={"severity": "critical"}))
    assert not report.refused
    gone = set(frame["row"]) - set(kept["row"])
    assert gone == {row_number(6), row_number(13)}
    assert report.dropped_by == {"pairs/split": 1, "pairs/duplicate": 1}


def test_severity_decides_between_refusal_and_a_note(gate: Gate) -> None:
    frame = clean_pairs()
    frame.loc[7, "chosen"] = ""
    config = settings(
        quarantine="refuse", empty_chosen={"severity": "warning"}, too_few={"severity": "off"},
        type={"severity": False},
    )  # fmt: skip
    report, kept = gate(frame, config=config)
    assert failed(report)["empty_chosen"].severity == "warning"
    report.raise_if_refused()
    assert len(kept) == 40
    assert not {"pairs/type", "pairs/too_few"} & {f.rule for f in report.findings}


def test_exactly_the_tolerated_share_passes(gate: Gate) -> None:
    frame = clean_pairs(100)
    # 1 - 0.57 is above 0.43 in binary floats: a naive threshold would refuse 57 of 100.
    for column, bad in (("rejected", 57), ("chosen", 58)):
        frame.loc[: bad - 1, column] = ""
    rule = {"max_rate": 0.57}
    report, _ = gate(frame, config=settings(empty_rejected=rule, empty_chosen=rule))
    findings = {f.rule: f for f in report.findings}
    for column, bad in (("rejected", 57), ("chosen", 58)):
        found = findings[f"pairs/empty_{column}"]
        assert (found.passed, found.count, found.rate) == (bad == 57, bad, bad / 100)
        assert found.threshold == rule
        assert len(found.rows) == 10


def test_other_thresholds_come_from_the_recipe(gate: Gate) -> None:
    frame = clean_pairs()
    frame["chosen"] = frame["chosen"] + " And there is more to say than that." * 3
    wide = settings(length_skew={"high": 1.0}, length_ratio={"high": 3.0}, too_few={"min_rows": 41})
    assert set(failed(gate(frame, config=wide)[0])) == {"too_few"}


def test_a_threshold_alone_keeps_the_rules_severity() -> None:
    config = settings(over_long={"max_rate": 0.5}, leakage={"max_rate": 0.5}, length_skew={"low": 0.1})
    assert config.over_long == RateRule(severity="warning", max_rate=0.5)
    assert config.leakage == RateRule(severity="critical", max_rate=0.5)
    assert (config.length_skew.low, config.length_skew.high) == (0.1, 0.8)


@pytest.mark.parametrize(
    "wrong",
    [{"leakage": {"max_rate": 1.5}}, {"length_skew": {"low": 0.9}}, {"unknown": {}}, {"leakage": {"max": 1}}],
)
def test_wrong_settings_are_errors(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        GateConfig.model_validate(wrong)


def test_every_setting_is_described() -> None:
    for name, field in GateConfig.model_json_schema()["properties"].items():
        assert field.get("description"), name


def test_a_baseline_that_is_none_is_a_data_error(gate: Gate) -> None:
    with pytest.raises(DataError, match="profile"):
        gate(clean_pairs(), baseline={"version": 1, "letters": {}})


def test_report_round_trip(refused: GateReport, dropped: tuple[GateReport, pd.DataFrame]) -> None:
    for report in (refused, dropped[0]):
        assert GateReport.model_validate_json(report.model_dump_json()) == report


def test_data_docs_are_on_disk_and_show_the_failure(dropped: tuple[GateReport, pd.DataFrame]) -> None:
    report, _ = dropped
    index = Path(report.docs_index)
    pages = {p: p.read_text(encoding="utf-8") for p in index.parent.rglob("*.html")}
    assert index in pages
    first = next(t for p, t in pages.items() if "validations/pairs/" in p.as_posix())
    again = next(t for p, t in pages.items() if "validations/pairs-after-quarantine/" in p.as_posix())
    assert "pairs/contradiction: at most 0.00% of the rows" in first
    assert "text-danger" in first  # the red cross beside a failed expectation
    assert "text-danger" not in again
    assert all(name in pages[index] for name in ("pairs-after-quarantine", "pairs-schema"))


@pytest.mark.parametrize(
    ("file", "by"),
    [
        ("hh_harmless_base_test.jsonl.gz", {"pairs/fault": 5, "pairs/empty_chosen": 4}),
        (
            "pandalm_human_testset.json.gz",
            {"pairs/fault": 6, "pairs/empty_chosen": 1, "pairs/empty_rejected": 51},
        ),
        ("llamafactory_dpo_en_demo.json.gz", {}),
        ("hhh_alignment.jsonl.gz", {}),
    ],
)
def test_real_data(gate: Gate, shared: Path, file: str, by: dict[str, int]) -> None:
    frame = load(DataConfig(path=str(shared / "data" / "preference" / file))).frame
    frame = split_by_prompt(frame, eval_fraction=0.1, seed=0)
    report, kept = gate(frame, config=DROP)
    report.raise_if_refused()
    refused = {f.rule: f for f in report.before if f.severity == "critical" and not f.passed}
    assert {name: f.count for name, f in refused.items()} == report.dropped_by == by
    if "pairs/fault" in by:
        assert set(refused["pairs/fault"].rows) == set(frame.loc[frame["fault"] != "", "row"])
    assert len(kept) == len(frame) - sum(by.values())
