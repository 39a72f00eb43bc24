"""The store: a committed artifact is found again intact, and any damage is detected."""

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tasks.store.manifest
from dpo_core.errors import RecipeError, StageFailed
from tasks.store.manifest import digest_folder, stage_key
from tasks.store.store import ArtifactInfo, Store
from tests.support.runs.stored import CONFIG, INFO, KEY, REPO, assert_clean, make, write


def test_commit_then_lookup(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.lookup("sft", KEY) is None
    scratch = store.begin("sft", KEY)
    assert scratch == store.begin("sft", KEY) == tmp_path / "work" / "sft" / KEY[:16]
    write(scratch, {"artifact/model.bin": b"weights", "artifact/a/config.json": b"{}", "checkpoint": b"big"})
    manifest = store.commit(
        "sft",
        KEY,
        scratch / "artifact",
        ArtifactInfo("model", 1, CONFIG, [CONFIG], parameters=7, extra={"loss": 0.5}),
    )
    assert manifest.path == tmp_path / "store" / "objects" / "model" / manifest.sha256[:2] / manifest.sha256
    assert digest_folder(manifest.path) == manifest.sha256
    assert (manifest.parameters, manifest.rows, manifest.extra, manifest.parents) == (
        7,
        None,
        {"loss": 0.5},
        (CONFIG,),
    )
    assert {name: entry.bytes for name, entry in manifest.files.items()} == {
        "a/config.json": 2,
        "model.bin": 7,
    }
    assert Store(tmp_path).lookup("sft", KEY) == manifest
    assert not scratch.exists(), "checkpoints of a finished stage are not kept"
    assert_clean(store)


def test_workspace_may_be_moved(tmp_path: Path) -> None:
    manifest = make(Store(tmp_path / "old"), {"f": b"1"})
    (tmp_path / "old").rename(tmp_path / "new")
    moved = Store((tmp_path / "new").as_uri()).lookup("sft", KEY)
    assert moved is not None
    assert moved.sha256 == manifest.sha256
    assert moved.path.is_relative_to(tmp_path / "new")


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
    manifest = store.commit("sft", KEY, files, INFO)
    assert (manifest.path / "model.bin").read_bytes() == b"mine"
    assert (manifest.path / "l").read_bytes() == b"theirs"
    assert (other / "tokenizer.json").stat().st_nlink == 1, (
        "a user's file must not share its inode with the store"
    )
    assert (manifest.path / "model.bin").stat().st_nlink == 1
    assert not own.exists()
    copied = store.commit("copy", KEY, {"a": other / "tokenizer.json"}, INFO)
    (other / "tokenizer.json").write_bytes(b"edited")
    assert (copied.path / "a").read_bytes() == b"theirs"
    assert_clean(store)


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
    manifest = make(store, {"f": b"1"})
    (manifest.path / "f").write_bytes(b"2")
    assert make(store, {"f": b"1"}).path == manifest.path
    assert (manifest.path / "f").read_bytes() == b"1"
    assert_clean(store)


contents = st.dictionaries(
    st.sampled_from(["a", "b.bin", "sub/c", "sub/deep/d", "e é"]), st.binary(max_size=300), min_size=1
)


@settings(max_examples=40, deadline=None)
@given(contents, st.data())
def test_any_single_damage_is_found(files: dict[str, bytes], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        manifest = make(store, files)
        assert store.lookup("sft", KEY) == manifest
        name = data.draw(st.sampled_from(sorted(files)))
        victim, content = manifest.path / name, files[name]
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
        assert store.lookup("sft", KEY) is None
        assert not manifest.path.exists()
        assert not list((store.root / "index" / "sft").iterdir()), "the index entry is gone too"
        assert make(store, files).sha256 == manifest.sha256
        assert_clean(store)


def test_verification_is_remembered_but_never_hides_a_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    manifest = make(store, {"f": b"12345"})
    os.utime(manifest.path / "f", (1e9, 1e9))  # an old file: its time stamp can be trusted
    hashed: list[Path] = []
    real = tasks.store.manifest.digest_file
    monkeypatch.setattr(
        tasks.store.manifest, "digest_file", lambda path: (hashed.append(path), real(path))[1]
    )
    assert store.lookup("sft", KEY)
    assert store.lookup("sft", KEY)
    assert len(hashed) == 1, "a store reads a file once"
    (manifest.path / "f").write_bytes(b"12344")
    assert store.lookup("sft", KEY) is None


def test_bad_sources_and_names(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(StageFailed, match="produced no files"):
        store.commit("sft", KEY, store.begin("sft", KEY), INFO)
    with pytest.raises(StageFailed, match="nowhere"):
        store.commit("sft", KEY, tmp_path / "nowhere", INFO)
    with pytest.raises(StageFailed, match="nowhere"):
        store.commit("sft", KEY, {"f": tmp_path / "nowhere"}, INFO)
    for name in ("../f", "/f", "a//b", "."):
        with pytest.raises(ValueError, match="relative path"):
            store.commit("sft", KEY, {name: REPO / "LICENSE"}, INFO)
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
