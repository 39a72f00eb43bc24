"""A finished run whose files are damaged, and run again: what is damaged is made again, bit for bit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.flows.test_alignment import STAGES
from tests.scenarios.faults.whole import assert_store_clean
from tests.support.runs.tiny_run import Bench
from tests.tasks.store.test_damage import DAMAGES, flip

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1200)]


def artifact(bench: Bench, stage: str) -> Path:
    """The folder that the stage has made."""
    (entry,) = (bench.workspace / "store" / "index" / stage.partition(" ")[0]).glob("*.json")
    return bench.workspace / "store" / json.loads(entry.read_text())["manifest"]["uri"]


def largest_file(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def run_again(bench: Bench) -> tuple[dict, str]:
    """The report of another run, and what it said."""
    done = bench.dpo("run", str(bench.recipe), "--json", timeout=900)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return json.loads(done.stdout), done.stderr


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_run_whose_every_artifact_is_damaged(finished: tuple[Bench, dict], damage: str) -> None:
    reference, whole = finished
    own = reference.copy(f"damaged-{damage.replace(' ', '-')}")
    harmed = {largest_file(artifact(own, stage)) for stage in STAGES}
    for path in harmed:
        DAMAGES[damage](path)
    report, said = run_again(own)
    assert {stage for stage, state in own.states(report).items() if state != "ran"} == set()
    for path in harmed:
        assert path.name in said
    assert said.count("it will be rebuilt") >= len(harmed)
    assert own.index() == reference.index()
    assert_store_clean(own.workspace)
    assert report["evaluation"] == whole["evaluation"]


@pytest.mark.parametrize("stage", STAGES)
def test_of_a_run_with_one_damaged_artifact_one_stage_is_done_again(
    finished: tuple[Bench, dict], stage: str
) -> None:
    reference, whole = finished
    own = reference.copy(f"damaged-{stage}")
    flip(largest_file(artifact(own, stage)))
    report, _ = run_again(own)
    assert [name for name, state in own.states(report).items() if state != "cached"] == [stage]
    assert own.index() == reference.index()
    assert_store_clean(own.workspace)
    assert report["evaluation"] == whole["evaluation"]


def _records(workspace: Path) -> list[Path]:
    (folder,) = (workspace / "runs").iterdir()
    return [path for path in folder.iterdir() if path.is_file()]


BESIDE: dict[str, Callable[[Path], list[Path]]] = {
    "index": lambda workspace: list((workspace / "store" / "index").glob("*/*.json")),
    "reference cache": lambda workspace: [
        p for p in (workspace / "reference_cache").rglob("*") if p.is_file()
    ],
    "records": _records,
}


@pytest.mark.parametrize("damage", ["truncate", "empty", "delete", "folder"])
@pytest.mark.parametrize("what", BESIDE)
def test_a_run_whose_other_files_are_damaged(finished: tuple[Bench, dict], what: str, damage: str) -> None:
    reference, whole = finished
    own = reference.copy(f"damaged-{what.replace(' ', '-')}-{damage}")
    harmed = BESIDE[what](own.workspace)
    assert harmed
    for path in harmed:
        DAMAGES[damage](path)
    if what == "reference cache":  # it is read where a reference is to be cached
        shutil.rmtree(own.workspace / "store" / "index" / "cache-reference")
    report, _ = run_again(own)
    assert own.index() == reference.index()
    assert_store_clean(own.workspace)
    assert report["evaluation"] == whole["evaluation"]
    listed = own.dpo("runs", "--workspace", str(own.workspace), "--json")
    assert listed.returncode == 0, listed.stderr
    newest = json.loads(listed.stdout)[0]
    assert newest["status"] == "done"
