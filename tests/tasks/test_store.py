"""The store against damage, kills, rivals and bad disks: real files, real processes."""

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tasks.store
from dpo_core.errors import RecipeError, StageFailed
from tasks.manifest import Manifest, digest_config, digest_folder, stage_key
from tasks.store import Store

REPO = Path(__file__).resolve().parents[2]
CONFIG = digest_config({"lr": 1e-6})
KEY = stage_key("sft", 1, CONFIG, [])


def write(folder: Path, files: Mapping[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def make(store: Store, files: Mapping[str, bytes], key: str = KEY, stage: str = "sft") -> Manifest:
    folder = write(store.begin(stage, key) / "artifact", files)
    return store.commit(stage, key, folder, kind="model", stage_version=1, config_digest=CONFIG, rows=1)


def assert_clean(store: Store) -> None:
    """Every object is whole, every index entry leads to one, and nothing unfinished is left."""
    for folder in (store.root / "objects").glob("*/*/*"):
        assert digest_folder(folder) == folder.name
    for entry in (store.root / "index").glob("*/*.json"):
        assert store.lookup(entry.parent.name, entry.stem) is not None
    assert not list((store.root / "tmp").iterdir())


def python(code: str, *arguments: object, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=REPO, text=True, stdout=subprocess.PIPE, **options)  # type: ignore[call-overload,no-any-return]


def test_commit_then_lookup(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.lookup("sft", KEY) is None
    scratch = store.begin("sft", KEY)
    assert scratch == store.begin("sft", KEY) == tmp_path / "work" / "sft" / KEY[:16]
    write(scratch, {"artifact/model.bin": b"weights", "artifact/a/config.json": b"{}", "checkpoint": b"big"})
    made = store.commit(
        "sft", KEY, scratch / "artifact", kind="model", stage_version=1, config_digest=CONFIG,
        parents=[CONFIG], parameters=7, extra={"loss": 0.5},
    )  # fmt: skip
    assert made.path == tmp_path / "store" / "objects" / "model" / made.sha256[:2] / made.sha256
    assert digest_folder(made.path) == made.sha256
    assert (made.parameters, made.rows, made.extra, made.parents) == (7, None, {"loss": 0.5}, (CONFIG,))
    assert {name: entry.bytes for name, entry in made.files.items()} == {"a/config.json": 2, "model.bin": 7}
    assert Store(tmp_path).lookup("sft", KEY) == made
    assert not scratch.exists(), "checkpoints of a finished stage are not kept"
    assert_clean(store)


def test_workspace_may_be_moved(tmp_path: Path) -> None:
    made = make(Store(tmp_path / "old"), {"f": b"1"})
    (tmp_path / "old").rename(tmp_path / "new")
    found = Store((tmp_path / "new").as_uri()).lookup("sft", KEY)
    assert found is not None
    assert found.sha256 == made.sha256
    assert found.path.is_relative_to(tmp_path / "new")


def test_named_files_are_taken_from_the_scratch_and_copied_from_elsewhere(tmp_path: Path) -> None:
    store = Store(tmp_path / "w")
    own = write(store.begin("sft", KEY), {"last/model.bin": b"mine", "checkpoint": b"x"})
    other = write(tmp_path / "user", {"tokenizer.json": b"theirs"})
    (other / "link.json").symlink_to(other / "tokenizer.json")
    files = {
        "model.bin": own / "last/model.bin",
        "t/tokenizer.json": other / "tokenizer.json",
        "l": other / "link.json",
    }
    made = store.commit("sft", KEY, files, kind="model", stage_version=1, config_digest=CONFIG)
    assert (made.path / "model.bin").read_bytes() == b"mine"
    assert (made.path / "l").read_bytes() == b"theirs"
    assert (other / "tokenizer.json").stat().st_nlink == 1, (
        "a user's file must not share its inode with the store"
    )
    assert (made.path / "model.bin").stat().st_nlink == 1
    assert not own.exists()
    kept = store.commit(
        "copy", KEY, {"a": other / "tokenizer.json"},
        kind="model", stage_version=1, config_digest=CONFIG, keep_work=True,
    )  # fmt: skip
    (other / "tokenizer.json").write_bytes(b"edited")
    assert (kept.path / "a").read_bytes() == b"theirs"
    assert_clean(store)


def test_a_users_folder_is_copied_not_moved(tmp_path: Path) -> None:
    user = write(tmp_path / "user", {"model.bin": b"1"})
    made = Store(tmp_path / "w").commit(
        "base", KEY, user, kind="model", stage_version=1, config_digest=CONFIG
    )
    assert (user / "model.bin").read_bytes() == b"1"
    assert (made.path / "model.bin").read_bytes() == b"1"


def test_keep_work_leaves_everything(tmp_path: Path) -> None:
    store = Store(tmp_path)
    scratch = write(store.begin("sft", KEY), {"a/f": b"1", "checkpoint": b"2"})
    made = store.commit(
        "sft", KEY, scratch / "a", kind="model", stage_version=1, config_digest=CONFIG, keep_work=True
    )
    (scratch / "a/f").write_bytes(b"3")
    assert (made.path / "f").read_bytes() == b"1"
    assert (scratch / "checkpoint").exists()


def test_same_content_under_two_keys_is_one_object(tmp_path: Path) -> None:
    store = Store(tmp_path)
    other = stage_key("sft", 2, CONFIG, [])
    first, second = make(store, {"f": b"1"}), make(store, {"f": b"1"}, other)
    assert first.path == second.path
    assert len(list((store.root / "objects").glob("*/*/*"))) == 1
    assert make(store, {"f": b"1"}).sha256 == first.sha256
    assert_clean(store)


def test_commit_replaces_a_damaged_object(tmp_path: Path) -> None:
    store = Store(tmp_path)
    made = make(store, {"f": b"1"})
    (made.path / "f").write_bytes(b"2")
    assert make(store, {"f": b"1"}).path == made.path
    assert (made.path / "f").read_bytes() == b"1"
    assert_clean(store)


contents = st.dictionaries(
    st.sampled_from(["a", "b.bin", "sub/c", "sub/deep/d", "e é"]), st.binary(max_size=300), min_size=1
)


@settings(max_examples=80, deadline=None)
@given(contents, st.data())
def test_any_single_damage_is_found(files: dict[str, bytes], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        made = make(store, files)
        assert store.lookup("sft", KEY) == made
        name = data.draw(st.sampled_from(sorted(files)))
        victim, content = made.path / name, files[name]
        kinds = ["delete", "extra", "append", "rename"] + (["flip", "truncate"] if content else [])
        damage = data.draw(st.sampled_from(kinds))
        if damage == "delete":
            victim.unlink()
        elif damage == "extra":
            (victim.parent / "one more").touch()
        elif damage == "append":
            victim.write_bytes(content + b"\0")
        elif damage == "rename":
            victim.rename(victim.with_name("other name"))
        elif damage == "flip":
            bit = data.draw(st.integers(0, 8 * len(content) - 1))
            broken = bytearray(content)
            broken[bit // 8] ^= 1 << bit % 8
            victim.write_bytes(broken)
        else:
            os.truncate(victim, data.draw(st.integers(0, len(content) - 1)))
        assert store.lookup("sft", KEY, verify=False) == made
        assert store.lookup("sft", KEY) is None
        assert not made.path.exists()
        assert store.lookup("sft", KEY, verify=False) is None, "the index entry is gone too"
        assert make(store, files).sha256 == made.sha256
        assert_clean(store)


def test_damage_is_told_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Store(tmp_path)
    made = make(store, {"model.bin": b"12345"})
    (made.path / "model.bin").write_bytes(b"1234")
    with caplog.at_level(logging.INFO):
        assert store.lookup("sft", KEY) is None
    line = f"artifact {made.sha256} of stage sft is damaged (file model.bin: 4 bytes instead of 5); "
    line += "it will be rebuilt"
    assert [record.getMessage() for record in caplog.records] == [line]


def test_whole_object_gone(tmp_path: Path) -> None:
    store = Store(tmp_path)
    shutil.rmtree(make(store, {"f": b"1"}).path)
    assert store.lookup("sft", KEY) is None


@pytest.mark.parametrize("position", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_damaged_index_entry_runs_the_stage_again(tmp_path: Path, position: float, damage: str) -> None:
    store = Store(tmp_path)
    made = make(store, {"f": b"1"})
    index = store.root / "index" / "sft" / f"{KEY}.json"
    content = bytearray(index.read_bytes())
    if damage == "flip":
        content[int(position * len(content))] ^= 1
        index.write_bytes(content)
    else:
        index.write_bytes(content[: int(position * len(content))])
    assert store.lookup("sft", KEY) is None
    assert not index.exists()
    assert make(store, {"f": b"1"}).sha256 == made.sha256


def test_verification_is_remembered_but_never_hides_a_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    made = make(store, {"f": b"12345"})
    os.utime(made.path / "f", (1e9, 1e9))  # an old file: its time stamp can be trusted
    hashed: list[Path] = []
    real = tasks.store.digest_file
    monkeypatch.setattr(tasks.store, "digest_file", lambda path: (hashed.append(path), real(path))[1])
    assert store.lookup("sft", KEY)
    assert Store(tmp_path).lookup("sft", KEY)
    assert len(hashed) == 1
    (made.path / "f").write_bytes(b"12344")
    assert store.lookup("sft", KEY) is None


def test_bad_sources_and_names(tmp_path: Path) -> None:
    store = Store(tmp_path)
    facts = {"kind": "model", "stage_version": 1, "config_digest": CONFIG}
    with pytest.raises(StageFailed, match="made no files"):
        store.commit("sft", KEY, store.begin("sft", KEY), **facts)  # type: ignore[arg-type]
    with pytest.raises(StageFailed, match="nowhere"):
        store.commit("sft", KEY, tmp_path / "nowhere", **facts)  # type: ignore[arg-type]
    with pytest.raises(StageFailed, match="nowhere"):
        store.commit("sft", KEY, {"f": tmp_path / "nowhere"}, **facts)  # type: ignore[arg-type]
    for name in ("../f", "/f", "a//b", "."):
        with pytest.raises(ValueError, match="relative path"):
            store.commit("sft", KEY, {name: REPO / "LICENSE"}, **facts)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="stage name"):
        store.begin("../sft", KEY)
    assert not list(tmp_path.glob("store/objects/*/*/*"))


@pytest.mark.parametrize("url", ["s3://bucket/runs", "gs://b", "abfss://c@a/x", "hdfs://n/x"])
def test_remote_workspace_is_refused_clearly(url: str) -> None:
    with pytest.raises(RecipeError, match="remote URL") as caught:
        Store(url)
    assert caught.value.remedy


def test_workspace_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    with pytest.raises(RecipeError, match="is a file"):
        Store(tmp_path / "f")


COMMIT_FOREVER = """
import os, sys
from pathlib import Path
from tasks.manifest import digest_config, stage_key
from tasks.store import Store
store, how, number = Store(sys.argv[1]), sys.argv[2], int(sys.argv[3])
print("ready", flush=True)
while True:
    number += 1
    key = stage_key("sft", number, "c" * 64, [])
    with store.lock("sft", key):
        if store.lookup("sft", key): continue
        folder = store.begin("sft", key) / "artifact"
        folder.mkdir(exist_ok=True)
        for name in "abcd":
            (folder / name).write_bytes(os.urandom(300_000))
        store.commit("sft", key, folder, kind="model", stage_version=number, config_digest="c" * 64,
                     keep_work=how == "copy")
"""


@pytest.mark.parametrize("how", ["move", "copy"])
def test_kill_at_any_moment_leaves_whole_artifacts_or_none(tmp_path: Path, how: str) -> None:
    store, chance, swept = Store(tmp_path), random.Random(1), 0
    for kill in range(12):
        process = python(COMMIT_FOREVER, tmp_path, how, kill * 10_000)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(chance.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        swept += store.sweep()
        assert_clean(store)
    assert list((store.root / "objects").glob("*/*/*")), "the kills came too early to show anything"
    if how == "copy":
        assert swept, "no kill came in the middle of a commit"


def test_sweep_spares_the_living(tmp_path: Path) -> None:
    store = Store(tmp_path)
    make(store, {"f": b"1"})
    with store._temporary() as mine:
        host, pid, born, _ = mine.name.split("+")
        dead = [f"{host}+{pid}+{int(born) - 500}+reused", f"{host}+4194999+{born}+gone", "rubbish"]
        for name in [*dead, f"elsewhere+{pid}+{born}+new"]:
            (mine.parent / name).mkdir()
        old = mine.parent / f"elsewhere+{pid}+{born}+old"
        old.mkdir()
        os.utime(old, (1e9, 1e9))
        assert store.sweep() == 4
        assert sorted(path.name for path in mine.parent.iterdir()) == sorted(
            [mine.name, f"elsewhere+{pid}+{born}+new"]
        )


RIVAL = """
import sys, time, logging
from pathlib import Path
from tasks.store import Store
logging.basicConfig(level="INFO", stream=sys.stdout, format="%(message)s")
store, key, locked, seed = Store(sys.argv[1]), sys.argv[2], sys.argv[3] == "lock", sys.argv[4]
facts = dict(kind="model", stage_version=1, config_digest="c" * 64)
print("ready", flush=True)
sys.stdin.readline()
def work(text):
    store.begin("sft", key)
    source = Path(sys.argv[1]) / f"source-{seed}"
    source.mkdir(exist_ok=True)
    for name in "abcdef":
        (source / name).write_text(text * 100_000)
    return store.commit("sft", key, source, **facts)
if locked:
    with store.lock("sft", key):
        if store.lookup("sft", key) is None:
            print("worked", flush=True)
            time.sleep(1)
            work("x")
else:
    for turn in range(15):
        work("x" if turn % 3 else seed)
        store.lookup("sft", key)
"""


def race(workspace: Path, how: str) -> list[str]:
    rivals = [python(RIVAL, workspace, KEY, how, seed, stdin=subprocess.PIPE) for seed in range(3)]
    for rival in rivals:
        assert rival.stdout is not None
        assert rival.stdout.readline() == "ready\n"
    for rival in rivals:
        assert rival.stdin is not None
        rival.stdin.write("\n")
        rival.stdin.flush()
    outputs = [rival.communicate(timeout=60)[0] for rival in rivals]
    assert [rival.returncode for rival in rivals] == [0, 0, 0]
    return outputs


def test_of_rivals_with_the_lock_one_works_and_the_others_are_told_who(tmp_path: Path) -> None:
    outputs = race(tmp_path, "lock")
    assert "".join(outputs).count("worked") == 1
    waiting = [output for output in outputs if "worked" not in output]
    assert all(f"stage sft (key {KEY[:16]}) is being done by process " in output for output in waiting)
    assert Store(tmp_path).lookup("sft", KEY)
    assert_clean(Store(tmp_path))


def test_rivals_without_the_lock_corrupt_nothing(tmp_path: Path) -> None:
    outputs = race(tmp_path, "free")
    assert not any("damaged" in output for output in outputs)
    assert Store(tmp_path).lookup("sft", KEY)
    assert_clean(Store(tmp_path))


@contextmanager
def unprivileged() -> Iterator[Path]:
    """A folder and a user that is bound by permissions, which root is not."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    if os.getuid() == 0:
        os.seteuid(65534)
    try:
        yield folder
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
        shutil.rmtree(folder, ignore_errors=True)


def test_no_permission_names_the_path_and_the_remedy() -> None:
    with unprivileged() as folder:
        if os.getuid() != 0:
            folder.chmod(0o555)
        for call in (lambda s: s.begin("sft", KEY), lambda s: s.lock("sft", KEY).__enter__()):
            with pytest.raises(RecipeError, match=str(folder)) as caught:
                call(Store(folder / "w"))
            assert "workspace" in caught.value.remedy
        with pytest.raises(RecipeError, match="no access"):
            Store(folder / "w").commit(
                "sft", KEY, {"f": REPO / "LICENSE"}, kind="model", stage_version=1, config_digest=CONFIG
            )
        assert Store(folder / "w").lookup("sft", KEY) is None
        assert Store(folder / "w").sweep() == 0
        assert not (folder / "w").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if os.getuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a small file system cannot be mounted here (needs root and mount permission)")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_full_disk_leaves_nothing_half_written(small_disk: Path, tmp_path: Path) -> None:
    store = Store(small_disk)
    make(store, {"small": b"1"})
    big = write(tmp_path / "big", {"a": bytes(400_000), "b": bytes(900_000)})
    other = stage_key("sft", 9, CONFIG, [])
    with pytest.raises(StageFailed, match="full") as caught:
        store.commit("sft", other, big, kind="model", stage_version=1, config_digest=CONFIG)
    assert str(small_disk) in caught.value.problem
    assert "Free some space" in caught.value.remedy
    assert store.lookup("sft", other) is None
    assert store.lookup("sft", KEY) is not None
    assert_clean(store)
    (big / "b").unlink()
    store.commit("sft", other, big, kind="model", stage_version=1, config_digest=CONFIG)
    assert_clean(store)


def test_read_only_disk_can_be_read(small_disk: Path) -> None:
    store = Store(small_disk)
    made = make(store, {"f": b"1"})
    broken = make(store, {"f": b"2"}, stage="broken")
    (broken.path / "f").write_bytes(b"3")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert store.lookup("sft", KEY) == made
    assert store.lookup("broken", KEY) is None
    with pytest.raises(RecipeError, match="Read-only"):
        make(store, {"f": b"4"}, stage="new")


def test_usage(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.usage() == {"work": 0}
    make(store, {"a": b"123", "b": b"45"})
    write(store.begin("next", KEY), {"checkpoint": b"1234"})
    assert store.usage() == {"model": 5, "work": 4}


def test_index_is_readable_json_without_absolute_paths(tmp_path: Path) -> None:
    store = Store(tmp_path)
    made = make(store, {"f": b"1"})
    text = (store.root / "index" / "sft" / f"{KEY}.json").read_text()
    assert json.loads(text)["manifest"]["sha256"] == made.sha256
    assert str(tmp_path) not in text
