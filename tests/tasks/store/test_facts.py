"""Facts of artifacts: strict validation when they are written, lenient when they are read."""

import ast
import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

import tasks
from dpo_core.errors import StageFailed
from tasks.stages.base import Output, Stage, _checked_facts
from tasks.store.facts import (
    Facts,
    GateFacts,
    ImportFacts,
    LoadFacts,
    ModelFacts,
    TrainingFacts,
    facts_of,
    weights_sha256,
)
from tasks.store.manifest import Manifest
from tasks.store.store import ArtifactInfo, Store

STAGE = Stage("train", 1, "model", TrainingFacts)


def manifest_with(tmp_path: Path, extra: dict[str, Any]) -> Manifest:
    (tmp_path / "file").write_text("weights")
    store = Store(tmp_path / "workspace")
    key = "a" * 64
    store.commit("train", key, {"file": tmp_path / "file"}, ArtifactInfo("model", 1, key, extra=extra))
    manifest = store.lookup("train", key)
    assert manifest is not None
    return manifest


def test_what_was_stated_is_kept_and_nothing_else(tmp_path: Path) -> None:
    facts = TrainingFacts(weights_sha256=None, steps=3, final={"loss": 0.5, "kl": math.nan}, flops=2.0)
    assert set(facts.as_extra()) == {"weights_sha256", "steps", "final", "flops"}
    manifest = manifest_with(tmp_path, facts.as_extra())
    again = facts_of(manifest, TrainingFacts)
    assert (again.steps, again.flops, again.final) == (3, 2.0, {"loss": 0.5, "kl": None})
    assert again.peak_memory_bytes is None


def test_an_unknown_fact_is_an_error_where_it_is_written() -> None:
    with pytest.raises(ValidationError, match="curves"):
        TrainingFacts(curves=3)  # type: ignore[call-arg]


def test_a_stage_states_the_facts_that_it_declares() -> None:
    with pytest.raises(TypeError, match="stage train returned GateFacts, but declares TrainingFacts"):
        _checked_facts(STAGE, Output(Path(), facts=GateFacts()).facts, 1.0)
    assert _checked_facts(STAGE, TrainingFacts(), 1.0).seconds == 1.0
    assert _checked_facts(STAGE, TrainingFacts(seconds=9.0), 1.0).seconds == 9.0


def test_manifests_of_other_versions_are_read(tmp_path: Path) -> None:
    manifest = manifest_with(tmp_path, {"kind": "pairs", "of_an_older_version": [1], "seconds": 2.0})
    assert facts_of(manifest, LoadFacts) == LoadFacts(kind="pairs", seconds=2.0)
    assert facts_of(manifest, Facts).seconds == 2.0


def test_a_missing_fact_is_named(tmp_path: Path) -> None:
    manifest = manifest_with(tmp_path, {"layout": "packed", "sampling": 3})
    with pytest.raises(StageFailed, match=r"stage train .* lacks valid facts \(reason, sampling\)"):
        facts_of(manifest, ImportFacts)
    with pytest.raises(StageFailed, match="has no weights_sha256"):
        weights_sha256(manifest)
    assert weights_sha256(manifest_with(tmp_path, ModelFacts(weights_sha256="w").as_extra())) == "w"


def test_facts_are_read_in_one_place() -> None:
    """Everything else asks for a model of them."""
    root = Path(tasks.__file__).parent.parent
    readers = {
        path.relative_to(root).as_posix()
        for package in ("tasks", "flows")
        for path in (root / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "extra"
    }
    assert readers == {"tasks/store/facts.py", "tasks/store/store.py"}, "the store only writes them"
