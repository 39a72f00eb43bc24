"""`dpo validate` reads what a run would read, and says how."""

import json
from pathlib import Path

import pytest

from dpo_core.errors import DataError
from flows.commands.validate import judge_file
from tests.scenarios.bad_inputs import dpo, good_rows, lines


def _pairs(path: Path, name: str, count: int) -> str:
    rows = [
        {"prompt": f"{name} {i}?", "chosen": "yes " * (i % 3 + 1), "rejected": "no " * 2, "hint": 1}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_evaluation_data_are_read_and_a_leak_is_found(tmp_path: Path) -> None:
    data, other = _pairs(tmp_path / "a.jsonl", "a", 9), _pairs(tmp_path / "b.jsonl", "b", 4)
    report, said, _ = judge_file(data, [f"data.eval_path={other}"])
    assert (report.rows, report.refused) == (13, False)
    assert f"held out: 4 rows of {other}" in said
    assert "columns not read: hint" in said
    assert report.remarks == said.split("\n  ")
    leaking, _, _ = judge_file(data, [f"data.eval_path={data}"])
    (leak,) = (finding for finding in leaking.findings if finding.rule == "pairs/leakage")
    assert (leak.passed, leak.count, leaking.refused) == (False, 9, True)
    with pytest.raises(DataError, match="there is no file or folder"):
        judge_file(data, [f"data.eval_path={tmp_path}/absent.jsonl"])


def test_a_mixture_in_place_of_the_path(tmp_path: Path) -> None:
    sets = [{"path": _pairs(tmp_path / f"{name}.jsonl", name, 8)} for name in "ab"]
    report, said, _ = judge_file(sets[0]["path"], ["data.path=null", f"data.mixture={json.dumps(sets)}"])
    assert report.rows == 16
    assert "rows 9 to 16 are those of" in said
    assert said.count("held out") == 2


def test_a_refusal_lists_each_rule_and_its_rows_once(tmp_path: Path) -> None:
    path = tmp_path / "same.jsonl"
    path.write_text(lines([row | {"rejected": row["chosen"]} for row in good_rows()]))
    done = dpo("validate", str(path))
    assert done.code == 3
    for part in ("pairs/identical: 24 of 24 rows", "source rows 1, 2, 3"):
        assert part in done.out
        assert part not in done.err
