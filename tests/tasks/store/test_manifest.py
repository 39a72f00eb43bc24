"""Manifests and digests: equal content gives equal digests, anything else does not."""

import hashlib
import json
from datetime import UTC
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from dpo_core.config import Config
from dpo_core.errors import StageFailed
from dpo_core.system import digest_file, digest_json
from tasks.store.manifest import (
    FileEntry,
    Manifest,
    digest_entries,
    digest_files,
    digest_folder,
    list_files,
    stage_key,
)

A, B = hashlib.sha256(b"a").hexdigest(), hashlib.sha256(b"b").hexdigest()

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def manifest(**changes: object) -> Manifest:
    facts = {
        "kind": "dataset",
        "uri": "file:///tmp/some%20where/x",
        "sha256": A,
        "schema_version": 1,
        "rows": 3,
        "parents": [B],
        "stage": "prepare",
        "stage_version": 2,
        "config_digest": B,
        "extra": {"kept": 3, "share": 0.5, "reasons": ["empty", None]},
        "files": {"rows.jsonl": {"sha256": A, "bytes": 1}},
    }
    return Manifest.model_validate(facts | changes)


def test_manifest_survives_json_and_is_frozen() -> None:
    first = manifest()
    assert Manifest.model_validate_json(first.model_dump_json()) == first
    assert first.created_at.tzinfo == UTC
    assert first.path == Path("/tmp/some where/x")
    with pytest.raises(ValidationError):
        first.rows = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    "changes",
    [
        {"sha256": "abc"},
        {"parents": ["not a digest"]},
        {"rows": -1},
        {"kind": "../model"},
        {"stage": "a/b"},
        {"created_at": "2026-01-01T00:00:00"},
        {"unknown": 1},
    ],
)
def test_manifest_rejects(changes: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        manifest(**changes)


def test_path_of_a_remote_artifact_is_an_error() -> None:
    with pytest.raises(StageFailed, match="s3://bucket/x"):
        _ = manifest(uri="s3://bucket/x").path


@given(st.dictionaries(st.text(), json_values, max_size=5))
def test_digest_config_ignores_order_only(config: dict[str, object]) -> None:
    backwards = dict(reversed(config.items()))
    assert digest_json(config) == digest_json(backwards) == digest_json(json.loads(json.dumps(config)))
    assert digest_json({**config, "one more": 1, "": 0}) != digest_json({**config, "one more": 2, "": 0})


def test_digest_config_is_canonical_json_of_models_too() -> None:
    class Slice(Config):
        beta: float = 0.1
        where: Path = Path("/data")

    expected = hashlib.sha256(b'{"beta":0.1,"where":"/data"}').hexdigest()
    assert digest_json(Slice()) == expected
    assert digest_json({"where": Path("/data"), "beta": 0.1}) == expected
    assert digest_json("é") == hashlib.sha256('"é"'.encode()).hexdigest()


def test_digest_config_refuses_what_json_cannot_hold() -> None:
    with pytest.raises(ValueError, match="JSON"):
        digest_json({"x": float("nan")})
    with pytest.raises(TypeError, match="set"):
        digest_json({"x": {1, 2}})


def test_digest_file_streams(tmp_path: Path) -> None:
    content = bytes(range(256)) * 30_000  # 7.7 MB: several blocks and a rest
    (tmp_path / "f").write_bytes(content)
    assert digest_file(tmp_path / "f") == hashlib.sha256(content).hexdigest()
    (tmp_path / "empty").touch()
    assert digest_file(tmp_path / "empty") == hashlib.sha256(b"").hexdigest()


def test_folder_digest_is_over_names_and_contents(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name / "sub").mkdir(parents=True)
    (tmp_path / "one/b").write_bytes(b"b")
    (tmp_path / "one/sub/a").write_bytes(b"a")
    (tmp_path / "two/sub/a").write_bytes(b"a")
    (tmp_path / "two/b").write_bytes(b"b")
    (tmp_path / "two/empty").mkdir()
    expected = hashlib.sha256(
        json.dumps([["b", B], ["sub/a", A]], separators=(",", ":")).encode()
    ).hexdigest()
    assert digest_folder(tmp_path / "one") == digest_folder(tmp_path / "two") == expected
    (tmp_path / "two/b").rename(tmp_path / "two/c")
    assert digest_folder(tmp_path / "two") != expected


def test_digest_files_keeps_each_name_with_its_file(tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / f"{number:02}").write_bytes(b"x" * number)
    entries = digest_files(list_files(tmp_path))
    assert list(entries) == sorted(entries)
    for name, entry in entries.items():
        content = b"x" * int(name)
        assert entry == FileEntry(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))
    assert digest_entries(dict(reversed(entries.items()))) == digest_entries(entries)


def test_symbolic_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc/hostname")
    with pytest.raises(StageFailed, match="symbolic link"):
        list_files(tmp_path)


def test_stage_key_depends_on_each_part_and_on_roles() -> None:
    base = stage_key("train", 1, A, [A, B])
    assert base == stage_key("train", 1, A, (B, A))
    others = [
        stage_key("sft", 1, A, [A, B]),
        stage_key("train", 2, A, [A, B]),
        stage_key("train", 1, B, [A, B]),
        stage_key("train", 1, A, [A]),
        stage_key("train", 1, A, {"policy": A, "reference": B}),
        stage_key("train", 1, A, {"policy": B, "reference": A}),
    ]
    assert len({base, *others}) == 7
