"""A whole run on a mixture of two sets: what it reads is said, and its policies are measured on each."""

import json
from pathlib import Path

import pytest
import yaml

from tests.support.models.tiny import make_tiny_model
from tests.support.runs.tiny_run import Bench, tiny_recipe


def _write(path: Path, rows: list[dict]) -> dict:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"path": str(path)}


@pytest.mark.slow
def test_sets_of_a_mixture_are_measured_apart(tmp_path: Path) -> None:
    pairs = [
        {"prompt": f"The soup of day {i} was", "chosen": " good.", "rejected": " bad.", "hint": "h"}
        for i in range(20)
    ]
    answers = [{"answer": " warm and fine.", "score": 4}, {"answer": " cold.", "score": 1}]
    ranked = [{"prompt": f"The bread of day {i} was", "answers": answers} for i in range(16)]
    recipe = tiny_recipe(make_tiny_model(tmp_path / "model", taught=True), tmp_path / "runs")
    recipe["data"] = {
        "mixture": [_write(tmp_path / "soup.jsonl", pairs), _write(tmp_path / "bread.jsonl", ranked)],
        "eval_fraction": 0.3,
    }
    recipe["sft"] = {"enabled": False}
    del recipe["policies"]["PPO"]
    recipe["gate"] = {"length_skew": {"severity": "off"}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    report = Bench(tmp_path).run()
    notes = report["notes"]
    assert "soup.jsonl: columns not read: hint" in notes["How the data were read"]
    assert notes["Rows by set"].count("held out") == 2
    measured = notes["Preference accuracy of DPO by set"]
    assert f"{tmp_path}/soup.jsonl: " in measured
    assert f"{tmp_path}/bread.jsonl: " in measured
    page = (tmp_path / "runs" / "runs" / report["run"]["name"] / "page.html").read_text()
    assert "Preference accuracy of DPO by set" in page
