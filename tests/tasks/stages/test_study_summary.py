"""What a study compares of the suites of its policies."""

import json
from pathlib import Path

from dpo_core.evaluation.results import MeasureSpec
from tasks.stages.base import StageResult
from tasks.stages.study_summary import suite_values
from tasks.store.manifest import Manifest
from tests.support.reports.made import items_of, result_of


def test_a_measure_of_some_items_is_compared_apart(tmp_path: Path) -> None:
    items = items_of([1, 0, 1, 1])
    for item in (items[1], items[3]):
        item.values["held_out"] = item.values["right"]
    for item in items:
        item.values["clutter"] = 0.5
    specs = [MeasureSpec(name=name, label=name) for name in ("right", "held_out", "clutter")]
    made = result_of("A", items, specs, suite="scenes").model_dump(mode="json")
    (tmp_path / "suites.json").write_text(json.dumps([made]))
    manifest = Manifest(
        kind="suite-results", uri=tmp_path.as_uri(), sha256="0" * 64, schema_version=1, stage="suites",
        stage_version=1, config_digest="0" * 64,
    )  # fmt: skip
    stages = {"suites A": StageResult(name="suites A", manifest=manifest, cached=True, seconds=0)}
    assert suite_values(stages, " A") == {"scenes": [1, 0, 1, 1], "scenes/held_out": [0, 1]}
    assert suite_values(stages, " B") == {}
