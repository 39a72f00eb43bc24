"""`dpo gc` on the caches of a workspace: merges log-probs, removes leftovers and what nobody used lately."""

import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from dpo_core.checked_json import read_checked, write_checked
from dpo_core.judging.cache import Reply, ReplyCache
from dpo_core.reference.cache import ReferenceCache, ReferenceFacts
from dpo_core.temporary import temporary_in
from flows.cli.main import app
from tasks.housekeeping.caches import clean_caches
from tasks.store.files import CACHE_FOLDER, REPLIES, SUITE_RESULTS

DAY = 24 * 3600.0
KEYS = [number.to_bytes(16, "big") for number in (1, 2, 3)]


def entry(number: int, tokens: int = 3) -> dict[bytes, np.ndarray]:
    return {number.to_bytes(16, "big"): np.full(tokens, -float(number), np.float32)}


def reference(workspace: Path, weights: str, *shards: dict[bytes, np.ndarray]) -> ReferenceCache:
    facts = ReferenceFacts(weights_sha256=weights, precision="bf16", attention="sdpa")
    cache = ReferenceCache(workspace / CACHE_FOLDER / facts.key, facts)
    for entries in shards:
        cache.add(entries)
    return cache


@pytest.fixture
def cache(tmp_path: Path) -> ReferenceCache:
    """Four shards of three entries, one of them twice."""
    return reference(tmp_path, "a" * 64, entry(1), entry(2, 5), entry(3), entry(2, 5))


def age(path: Path, days: float) -> None:
    then = time.time() - days * DAY
    for part in (path / "reference.json", path) if path.is_dir() else (path,):
        os.utime(part, (then, then))


def test_many_shards_become_one_with_every_value(tmp_path: Path, cache: ReferenceCache) -> None:
    before, reader = cache.select(KEYS), ReferenceCache(cache.folder)
    assert clean_caches(tmp_path, unused_days=90, dry_run=True).merged == {cache.folder.name: 4}
    assert len(list(cache.folder.glob("shard-*"))) == 4, "a dry run changes nothing"
    assert clean_caches(tmp_path, unused_days=90, dry_run=False).merged == {cache.folder.name: 4}
    after = ReferenceCache(cache.folder)
    assert [len(shard) for shard in after.shards] == [3]
    for shard in (after.select(KEYS), reader.select(KEYS)):  # a run that had it open goes on
        np.testing.assert_array_equal(shard.values, before.values)
        np.testing.assert_array_equal(shard.keys_N2, before.keys_N2)
    assert clean_caches(tmp_path, unused_days=90, dry_run=False).merged == {}
    assert not list(tmp_path.rglob("tmp-*"))


def test_a_damaged_shard_is_removed_and_the_others_stay(
    tmp_path: Path, cache: ReferenceCache, caplog: pytest.LogCaptureFixture
) -> None:
    values = min(cache.folder.glob("shard-*")) / "values.npy"
    content = bytearray(values.read_bytes())
    content[-2] ^= 1
    values.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        clean_caches(tmp_path, unused_days=90, dry_run=False)
    assert "its entries are computed again" in caplog.text
    assert ReferenceCache(cache.folder).has(KEYS).tolist() == [False, True, True]


def test_leftovers_of_killed_processes_go_and_those_of_living_ones_stay(
    tmp_path: Path, cache: ReferenceCache
) -> None:
    script = (
        "import sys; from pathlib import Path; from dpo_core.temporary import temporary_in;"
        "p = temporary_in(Path(sys.argv[1])); p.mkdir(); (p / 'a.npy').write_bytes(bytes(1000)); print(p)"
    )

    def killed(folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-c", script, str(folder)]
        return Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())

    caches = (cache.folder, tmp_path / SUITE_RESULTS, tmp_path / REPLIES / "aa")
    dead = [killed(folder) for folder in caches]
    living = temporary_in(cache.folder)
    foreign, old = cache.folder / "tmp-elsewhere+1+2+0123", cache.folder / "tmp-elsewhere+1+2+4567"
    for folder in (living, foreign, old):
        folder.mkdir()
    os.utime(old, (0, 0))
    removed = clean_caches(tmp_path, unused_days=90, dry_run=False).removed
    assert {(item.what, item.why) for item in removed} == {
        (str(path.relative_to(tmp_path)), "unfinished") for path in (*dead, old)
    }
    assert sum(item.bytes for item in removed) == 3000
    assert [p.exists() for p in (*dead, old, living, foreign)] == [False] * 4 + [True, True]


def test_what_was_not_used_lately_goes_and_why_is_said(tmp_path: Path, cache: ReferenceCache) -> None:
    other = reference(tmp_path, "b" * 64, entry(9))
    (tmp_path / CACHE_FOLDER / "notes").mkdir()
    replies = ReplyCache(tmp_path / REPLIES)
    for key in ("a" * 64, "b" * 64):
        replies.put(key, Reply(text="A"))
    result = tmp_path / SUITE_RESULTS / "ifeval-abc.json"
    write_checked(result, {"suite": "ifeval"})
    for path in (cache.folder, result, *(tmp_path / REPLIES).glob("*/*.json")):
        age(path, 91)
    assert replies.get("b" * 64) == Reply(text="A"), "a use"
    arguments = ["gc", "--workspace", str(tmp_path)]
    listed = CliRunner().invoke(app, [*arguments, "--dry-run"]).stdout
    for line in (
        "would keep    1 entry of reference_cache (recent)",
        "would remove  1 entry of reference_cache (unused)",
        "would remove  1 entry of evaluations (unused)",
        "would keep    1 entry of judgements (recent)",
    ):
        assert line in listed
    assert CliRunner().invoke(app, [*arguments, "--unused-for", "92"]).exit_code == 0
    assert read_checked(result, "") == {"suite": "ifeval"}
    age(result, 91)
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert {p.name for p in (tmp_path / CACHE_FOLDER).iterdir()} == {other.folder.name, "notes"}
    assert [path.stem for path in (tmp_path / REPLIES).glob("*/*")] == ["b" * 64]
    assert not result.exists()
