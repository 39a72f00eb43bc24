"""Damage to every kind of file that a run leaves is detected; a damaged file is never used silently."""

import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from dpo_core.checked_json import read_checked, write_checked
from dpo_core.errors import DpoError, RecipeError
from dpo_core.training.checkpoints import CheckpointInfo, Checkpoints
from tasks.preflight import _check_database
from tasks.promotion.model_source import require_intact
from tasks.runs.record import RunRecord, find_run, list_runs, save_run
from tasks.store.manifest import digest_folder
from tasks.store.store import Store
from tests.support.runs.stored import KEY, assert_clean, make, write


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "file").write_bytes(b"other")


def replace_by_link(path: Path) -> None:
    """To another file of the same size, elsewhere."""
    other = Path(tempfile.mkdtemp()) / path.name
    other.write_bytes(bytes(path.stat().st_size))
    path.unlink()
    path.symlink_to(other)


def replace_by_dead_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/nowhere")


DAMAGES: dict[str, Callable[[Path], None]] = {
    "flip": flip,
    "truncate": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "delete": Path.unlink,
    "folder": replace_by_folder,
    "link": replace_by_link,
    "dead link": replace_by_dead_link,
}
every_damage = pytest.mark.parametrize("damage", DAMAGES)


@every_damage
def test_a_damaged_file_of_an_artifact_is_told_and_rebuilt(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(tmp_path)
    files = {"model.safetensors": b"weights", "shard/keys.npy": b"keys of a shard"}
    for name in files:
        caplog.clear()
        manifest = make(store, files)
        DAMAGES[damage](manifest.path / name)
        assert store.peek("sft", KEY) is None
        assert store.lookup("sft", KEY) is None
        (line,) = [record.getMessage() for record in caplog.records]
        assert line.startswith(f"artifact {manifest.sha256} of stage sft is damaged (")
        assert name in line
        assert line.endswith("it will be rebuilt")
    assert make(store, files).sha256 == manifest.sha256
    assert_clean(store)


@pytest.mark.parametrize("damage", ["delete", "file", "link", "dead link"])
@pytest.mark.parametrize("with_index", [True, False])
def test_a_damaged_folder_of_an_artifact_is_rebuilt(tmp_path: Path, damage: str, with_index: bool) -> None:
    store = Store(tmp_path)
    manifest = make(store, {"f": b"1"})
    shutil.rmtree(manifest.path)
    if damage == "file":
        manifest.path.write_bytes(b"1")
    elif damage == "link":
        manifest.path.symlink_to(write(tmp_path / "elsewhere", {"f": b"2"}))
    elif damage == "dead link":
        manifest.path.symlink_to("/nowhere")
    if not with_index:
        (store.root / "index" / "sft" / f"{KEY}.json").unlink()
    assert store.lookup("sft", KEY) is None
    assert make(store, {"f": b"1"}).sha256 == manifest.sha256
    assert (manifest.path / "f").read_bytes() == b"1"
    assert_clean(store)


@every_damage
def test_a_damaged_index_entry_runs_its_stage_again(tmp_path: Path, damage: str) -> None:
    store = Store(tmp_path)
    manifest = make(store, {"f": b"1"})
    DAMAGES[damage](store.root / "index" / "sft" / f"{KEY}.json")
    assert store.peek("sft", KEY) is None
    assert store.lookup("sft", KEY) is None
    assert make(store, {"f": b"1"}).sha256 == manifest.sha256
    assert_clean(store)


@every_damage
def test_a_damaged_partial_result_is_made_again(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "work" / "policy-DPO.json"
    path.parent.mkdir()
    value = {"rewards": [0.5, float("inf")], "texts": ["é"]}
    write_checked(path, value)
    assert read_checked(path, "again") == value
    DAMAGES[damage](path)
    assert read_checked(path, "DPO is measured again") is None
    warned = "DPO is measured again" in caplog.text
    assert warned == (damage not in ("delete", "dead link")), "what is not there is no damage"
    write_checked(path, value)
    assert read_checked(path, "again") == value


@every_damage
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, damage: str) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    names = ["mp_rank_00_model_states.pt", "random-00000.pt", "digest.json"]
    for name in names:
        for step in (1, 2):
            folder = checkpoints.begin(step)
            write(folder, {"mp_rank_00_model_states.pt": b"weights", "random-00000.pt": b"random"})
            checkpoints.commit(folder, CheckpointInfo(step, 1, 0))
        DAMAGES[damage](checkpoints.folder / "step-00000002" / name)
        newest = checkpoints.newest()
        assert newest is not None
        assert newest[1].step == 1, name
    for step in (2, 3):
        target = checkpoints.folder / f"step-{step:08d}"
        shutil.rmtree(target, ignore_errors=True)
        target.write_bytes(b"a file in its place")
        folder = checkpoints.begin(step)
        write(folder, {"mp_rank_00_model_states.pt": b"weights"})
        checkpoints.commit(folder, CheckpointInfo(step, 1, 0))
    newest = checkpoints.newest()
    assert newest is not None
    assert newest[1].step == 3


@every_damage
def test_a_damaged_record_is_told_and_never_resumed(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    older, newer = (
        RunRecord(run_id=name, recipe="tiny", started_at=datetime(2026, 1, day, tzinfo=UTC))
        for day, name in enumerate(("older", "newer"), 1)
    )
    save_run(tmp_path, older)
    save_run(tmp_path, newer)
    path = tmp_path / "runs" / "newer" / "run.json"
    DAMAGES[damage](path)
    if damage == "flip" and [run.run_id for run in list_runs(tmp_path)] == ["newer", "older"]:
        pytest.skip("a letter of a text")
    assert [run.run_id for run in list_runs(tmp_path)] == ["older"]
    if damage not in ("delete", "dead link"):
        assert f"the record {path} is damaged" in caplog.text
        assert "without --resume" in caplog.text
    with pytest.raises(RecipeError, match="newer"):
        find_run(tmp_path, "newer", "tiny")


@every_damage
def test_a_damaged_tracking_database_is_told_before_anything_runs(
    tmp_path: Path, tracking_database: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    workspace = tmp_path / "w"
    workspace.mkdir()
    path = workspace / "mlflow.db"
    shutil.copyfile(tracking_database, path)
    record = RunRecord(run_id="r", recipe="tiny", started_at=datetime.now(UTC), mlflow_run_id="m")
    save_run(workspace, record)
    _check_database(f"sqlite:///{path}", workspace)
    assert not caplog.records
    if damage == "flip":  # of a page's head: what stands in a cell SQLite cannot check
        page = bytearray(path.read_bytes())
        page[4096 * 5] ^= 0xFF
        path.write_bytes(page)
    else:
        DAMAGES[damage](path)
    if damage in ("empty", "delete", "dead link"):
        with caplog.at_level(logging.WARNING):
            _check_database(f"sqlite:///{path}", workspace)
        assert "is missing or empty: a new one is created" in caplog.text
    else:
        with pytest.raises(RecipeError, match="cannot be used") as caught:
            _check_database(f"sqlite:///{path}", workspace)
        assert "restore a copy" in caught.value.remedy


@every_damage
def test_a_damaged_model_is_neither_champion_nor_evaluated(tmp_path: Path, damage: str) -> None:
    folder = write(tmp_path / "model", {"model.safetensors": b"weights", "config.json": b"{}"})
    digest = digest_folder(folder)
    require_intact(folder, digest, "the champion x version 1")
    DAMAGES[damage](folder / "model.safetensors")
    with pytest.raises(DpoError, match="the champion x version 1 is damaged") as caught:
        require_intact(folder, digest, "the champion x version 1")
    assert "again" in caught.value.remedy
