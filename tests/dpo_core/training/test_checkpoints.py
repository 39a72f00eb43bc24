"""Checkpoints: how many are kept, verification by digests, and skipping damaged ones."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from dpo_core import job as train
from dpo_core.errors import StageFailed
from dpo_core.training.checkpoints import DIGEST, CheckpointInfo, Checkpoints, read_digest
from tests.support.runs.training_jobs import curve, demonstrations, pair_rows, timeless, write_job

ROWS = demonstrations(pair_rows(8))


def write(store: Checkpoints, step: int, *, ranks: int = 1, stage: int = 0, shards: int = 0) -> Path:
    temporary = store.begin(step)
    (temporary / "mp_rank_00_model_states.pt").write_bytes(b"weights %d" % step)
    for rank in range(shards):
        (temporary / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").write_bytes(b"moments")
    store.commit(temporary, CheckpointInfo(step, ranks, stage))
    return store.folder / f"step-{step:08d}"


def names(store: Checkpoints) -> list[str]:
    return sorted(p.name for p in store.folder.iterdir())


@pytest.fixture
def store(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", keep=2)


def test_the_newest_checkpoints_are_kept(store: Checkpoints) -> None:
    assert store.newest() is None
    for step in (5, 10, 15):
        write(store, step)
    assert names(store) == ["step-00000010", "step-00000015"]
    assert store.newest() == (store.folder / "step-00000015", CheckpointInfo(15, 1, 0))


def test_an_incomplete_checkpoint_is_never_loaded(store: Checkpoints) -> None:
    write(store, 5)
    half = store.begin(10)
    (half / "mp_rank_00_model_states.pt").write_bytes(b"wei")
    newest = store.newest()
    assert newest is not None
    assert newest[1].step == 5
    store.begin(15)
    assert names(store) == ["step-00000005", "tmp-step-00000015"]


def cut(folder: Path) -> None:
    file = folder / "mp_rank_00_model_states.pt"
    file.write_bytes(file.read_bytes()[:-1])


def flip(folder: Path) -> None:
    file = folder / "mp_rank_00_model_states.pt"
    file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])


def lose(folder: Path) -> None:
    (folder / "mp_rank_00_model_states.pt").unlink()


def lose_digest(folder: Path) -> None:
    (folder / DIGEST).unlink()


def cut_digest(folder: Path) -> None:
    (folder / DIGEST).write_text((folder / DIGEST).read_text()[:-3])


def change_digest(folder: Path) -> None:
    (folder / DIGEST).write_text((folder / DIGEST).read_text().replace('"ranks": 1', '"ranks": 2'))


@pytest.mark.parametrize("damage", [cut, flip, lose, lose_digest, cut_digest, change_digest])
def test_a_damaged_newest_falls_back_and_says_so(
    store: Checkpoints, caplog: pytest.LogCaptureFixture, damage: Any
) -> None:
    write(store, 5)
    damage(write(store, 10))
    with caplog.at_level(logging.WARNING):
        assert store.newest() == (store.folder / "step-00000005", CheckpointInfo(5, 1, 0))
    *damaged, last = [record.getMessage() for record in caplog.records]
    assert any("step-00000010 is damaged (" in message for message in damaged)
    assert last.endswith("step-00000005")


def test_all_damaged_names_the_folder(store: Checkpoints) -> None:
    flip(write(store, 5))
    lose(write(store, 10))
    with pytest.raises(StageFailed) as caught:
        store.newest()
    assert str(store.folder) in caught.value.problem
    changed = "step-00000005: mp_rank_00_model_states.pt has changed since it was written"
    assert changed in caught.value.problem
    assert "step-00000010: mp_rank_00_model_states.pt is missing" in caught.value.problem


def test_a_damaged_later_checkpoint_is_removed_by_the_next_save(store: Checkpoints) -> None:
    write(store, 5)
    flip(write(store, 10))
    write(store, 7)
    assert names(store) == ["step-00000005", "step-00000007"]


def test_a_missing_shard_of_a_rank_is_an_error(store: Checkpoints) -> None:
    write(store, 5, ranks=2, stage=2, shards=2)
    with pytest.raises(StageFailed, match=r"2 ranks wrote a checkpoint, but .* has the shards of only 1"):
        write(store, 10, ranks=2, stage=2, shards=1)
    assert read_digest(store.folder / "step-00000005") == CheckpointInfo(5, 2, 2)
    newest = store.newest()
    assert newest is not None
    assert newest[1].step == 5


# In a real run ----------------------------------------------------------------------------------------------


def job(folder: Path, tiny: Path, **engine: Any) -> Path:
    settings = {
        "batch_size": 4,
        "micro_batch_size": 4,
        "epochs": 100.0,
        "max_steps": 6,
        "optim": {"learning_rate": 1e-3},
        "engine": {"precision": "fp32", "threads": 1, "save_every": 2} | engine,
    }
    return write_job(folder, "sft", tiny, ROWS, settings=settings)


def run(job: Path) -> int:
    return train.main(["--config", str(job)])


def test_a_run_skips_a_damaged_checkpoint_and_gives_the_same_result(
    alone: None, tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = job(tmp_path, tiny)
    assert run(path) == 0
    straight, weights = timeless(tmp_path), (tmp_path / "out" / "model.safetensors").read_bytes()
    flip(tmp_path / "checkpoints" / "step-00000006")
    shutil.rmtree(tmp_path / "out")
    with caplog.at_level(logging.INFO):
        assert run(path) == 0
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("dpo_core")]
    assert any("step-00000006 is damaged" in line for line in messages)
    assert any("resuming from" in line and "step-00000004" in line for line in messages)
    assert timeless(tmp_path) == straight
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == weights
    assert read_digest(tmp_path / "checkpoints" / "step-00000006").step == 6


def test_a_run_with_only_damaged_checkpoints_does_not_start_over(
    alone: None, tiny: Path, tmp_path: Path
) -> None:
    path = job(tmp_path, tiny)
    assert run(path) == 0
    for folder in (tmp_path / "checkpoints").glob("step-*"):
        flip(folder)
    assert run(path) == 4
    error = json.loads((tmp_path / "error.json").read_text())
    assert f"every checkpoint in {tmp_path / 'checkpoints'} is damaged" in error["problem"]
    assert len(curve(tmp_path)) == 6, "nothing was thrown away"


def test_another_zero_stage_is_refused(alone: None, tiny: Path, tmp_path: Path) -> None:
    assert run(job(tmp_path, tiny)) == 0
    assert run(job(tmp_path, tiny, zero_stage=1)) == 4
    problem = json.loads((tmp_path / "error.json").read_text())["problem"]
    assert "was written with ZeRO stage 0, but the run uses stage 1" in problem


def test_a_checkpoint_holds_the_metrics_up_to_it(store: Checkpoints) -> None:
    """The file beside has no digest: a disk that fails, or a hand, may cut or change its lines."""
    store.folder.mkdir(parents=True)
    lines = '{"step": 1}\n{"step": 2}\n'
    store.curve.write_text(lines)
    store.commit(store.begin(2), CheckpointInfo(2, 1, 0))
    store.curve.write_text('{"step": 7}\n')
    newest = store.newest()
    assert newest is not None
    store.restore_curve(newest[0])
    assert store.curve.read_text() == lines
