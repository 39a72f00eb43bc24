"""The context that the tasks of a run receive."""

from pathlib import Path
from typing import Any

from prefect.utilities.collections import visit_collection

from tests.support.runs.contexts import make_context


def test_stages_with_labels_share_the_run(tmp_path: Path) -> None:
    context = make_context(tmp_path)
    labelled = context.labelled(" DPO seed 0")
    assert (labelled.label, context.label) == (" DPO seed 0", "")
    assert labelled.tracker is context.tracker
    assert labelled.store is context.store
    assert labelled.stop is context.stop


def test_prefect_looks_for_futures_beside_the_live_objects_and_copies_none(tmp_path: Path) -> None:
    context = make_context(tmp_path)
    visited: list[Any] = []

    def visit(value: Any) -> Any:
        visited.append(value)
        return value

    assert visit_collection({"context": context}, visit, return_data=True)["context"] is context
    assert any(value is context.tracker for value in visited)
    inside = [*vars(context.tracker).values(), *vars(context.store).values(), *vars(context.stop).values()]
    compound = [value for value in inside if isinstance(value, list | set | dict)]
    assert compound
    assert not any(value is part for value in visited for part in compound)
