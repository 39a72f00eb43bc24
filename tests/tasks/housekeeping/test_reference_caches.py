"""`dpo cache ls|verify|gc` on real shards, through the real command line."""

import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from dpo_core.errors import StageFailed
from dpo_core.reference.cache import ReferenceCache, ReferenceFacts, temporary_beside
from dpo_core.reference.keys import DEFINITION_VERSION
from flows.cli.cache import app
from tasks.housekeeping.reference_caches import collect_garbage, list_caches, verify_caches
from tasks.store.files import CACHE_FOLDER

DAY = 24 * 3600.0


def facts(weights: str) -> ReferenceFacts:
    return ReferenceFacts(
        weights_sha256=weights,
        precision="bf16",
        attention="sdpa",
        definition_version=DEFINITION_VERSION,
        model="prepare-sft of demo, 134,515,008 parameters",
    )


def entry(number: int, tokens: int = 3) -> dict[bytes, np.ndarray]:
    return {number.to_bytes(16, "big"): np.full(tokens, -float(number), np.float32)}


@pytest.fixture
def caches(tmp_path: Path) -> list[ReferenceCache]:
    """Two references: one with four shards of 3 entries (one of them twice), one with a single shard."""
    created = []
    for weights, shards in (
        ("a" * 64, [entry(1), entry(2, 5), entry(3), entry(2, 5)]),
        ("b" * 64, [entry(9)]),
    ):
        known = facts(weights)
        created.append(ReferenceCache(tmp_path / CACHE_FOLDER / known.key, known))
        for entries in shards:
            created[-1].add(entries)
    return created


def damage(cache: ReferenceCache, number: int) -> Path:
    """One changed bit in the values of a shard."""
    shard = sorted(cache.folder.glob("shard-*"))[number]
    content = bytearray((shard / "values.npy").read_bytes())
    content[-2] ^= 1
    (shard / "values.npy").write_bytes(content)
    return shard


def age(cache: ReferenceCache, days: float) -> None:
    then = time.time() - days * DAY
    for path in (cache.folder / "reference.json", cache.folder):
        os.utime(path, (then, then))


def call(workspace: Path, *arguments: str) -> Any:
    """A command in this process; its exception is the test's."""
    return CliRunner().invoke(app, [*arguments, "--workspace", str(workspace)], catch_exceptions=True)


def test_ls_says_what_each_cache_is(tmp_path: Path, caches: list[ReferenceCache]) -> None:
    age(caches[1], 3)
    listed = json.loads(call(tmp_path, "ls", "--json").stdout)
    assert [cache["key"] for cache in listed] == [caches[0].folder.name, caches[1].folder.name]
    first = listed[0]
    assert first["reference"]["weights_sha256"] == "a" * 64
    assert (first["entries"], first["tokens"], first["shards"], first["damaged"]) == (3, 16, 4, 0)
    assert first["bytes"] == sum(p.stat().st_size for p in caches[0].folder.rglob("*") if p.is_file())
    text = call(tmp_path, "ls").stdout
    assert f"{first['key'][:16]}  3 sequences, 16 tokens" in text
    assert "prepare-sft of demo, 134,515,008 parameters, weights aaaaaaaaaaaaaaaa, bf16, sdpa" in text


def test_ls_tells_a_cache_that_this_version_no_longer_reads(tmp_path: Path) -> None:
    known = facts("a" * 64)
    old = known.model_copy(update={"definition_version": DEFINITION_VERSION - 1})
    for cache in (known, old):
        ReferenceCache(tmp_path / CACHE_FOLDER / cache.key, cache).add(entry(1))
    assert {cache.key: cache.current for cache in list_caches(tmp_path)} == {known.key: True, old.key: False}
    lines = call(tmp_path, "ls").stdout.splitlines()
    lines_of_old = [i for i, line in enumerate(lines) if "not read by this one" in line]
    assert len(lines_of_old) == 1
    assert lines[lines_of_old[0] - 2].startswith(old.key[:16])


def test_ls_of_an_older_cache_and_of_none(tmp_path: Path, caches: list[ReferenceCache]) -> None:
    (caches[0].folder / "reference.json").unlink()
    # Facts of another key are no facts of this folder.
    (caches[1].folder / "reference.json").write_text(facts("c" * 64).model_dump_json())
    assert [cache.reference for cache in list_caches(tmp_path)] == [None, None]
    assert "reference not recorded" in call(tmp_path, "ls").stdout
    for command in ("ls", "verify"):
        assert "no reference log-probs in" in call(tmp_path / "nothing", command).stdout
    assert not (tmp_path / "nothing").exists(), "a look changes nothing"


def test_a_use_by_a_stage_is_seen_and_a_look_is_none(tmp_path: Path, caches: list[ReferenceCache]) -> None:
    for cache in caches:
        age(cache, 10)
    ReferenceCache(caches[1].folder, facts("b" * 64))
    list_caches(tmp_path)
    verify_caches(tmp_path)
    used = {cache.key: (time.time() - cache.last_used.timestamp()) / DAY for cache in list_caches(tmp_path)}
    assert used[caches[0].folder.name] == pytest.approx(10, abs=0.1)
    assert used[caches[1].folder.name] == pytest.approx(0, abs=0.1)


def test_verify_names_the_damage_and_repairs_it(tmp_path: Path, caches: list[ReferenceCache]) -> None:
    intact = call(tmp_path, "verify")
    assert intact.exit_code == 0
    assert "5 shards read, 5 complete entries" in intact.stdout
    changed, headless = damage(caches[0], 0), sorted(caches[0].folder.glob("shard-*"))[2]
    (headless / "shard.json").unlink()
    result = call(tmp_path, "verify", "--json")
    assert isinstance(result.exception, StageFailed)
    assert result.exception.exit_code == 4
    assert "2 of 5 shards" in str(result.exception)
    report = json.loads(result.stdout)
    assert [(d["shard"], d["removed"]) for d in report["damaged"]] == [
        (changed.name, False),
        (headless.name, False),
    ]
    assert "values.npy has changed since it was written" in report["damaged"][0]["problem"]
    assert changed.exists(), "only told"
    assert call(tmp_path, "verify", "--repair").exit_code == 0
    assert not changed.exists()
    assert not headless.exists()
    assert verify_caches(tmp_path).damaged == []
    # 1 and 3 are to be computed again, 2 is still known.
    assert ReferenceCache(caches[0].folder).has([*entry(1), *entry(2), *entry(3)]).tolist() == [
        False,
        True,
        False,
    ]


def test_the_exit_code_of_verify_is_that_of_the_process(tmp_path: Path, caches: list[ReferenceCache]) -> None:
    damage(caches[1], 0)
    command = [sys.executable, "-m", "flows.cli.main", "cache", "verify", "--workspace", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 4
    assert done.stderr.startswith("error: 1 of 5 shards of reference log-probs are damaged. Remove them with")
    assert "Traceback" not in done.stderr


def test_gc_makes_one_shard_of_many_and_keeps_every_value(
    tmp_path: Path, caches: list[ReferenceCache]
) -> None:
    keys = [*entry(1), *entry(2), *entry(3)]
    before = caches[0].select(keys)
    reader = ReferenceCache(caches[0].folder)
    report = json.loads(call(tmp_path, "gc", "--dry-run", "--json").stdout)
    assert report["merged"] == {caches[0].folder.name: 4}
    assert len(list(caches[0].folder.glob("shard-*"))) == 4, "only told"
    assert collect_garbage(tmp_path).merged == {caches[0].folder.name: 4}
    after = ReferenceCache(caches[0].folder)
    assert len(after.shards) == 1
    assert len(after.shards[0]) == 3
    for shard in (after.select(keys), reader.select(keys)):  # a run that had it open goes on
        np.testing.assert_array_equal(shard.values, before.values)
        np.testing.assert_array_equal(shard.keys_N2, before.keys_N2)
    assert collect_garbage(tmp_path).merged == {}, "nothing is left to merge"
    assert not list(tmp_path.rglob("tmp-*"))


def test_gc_of_a_damaged_shard_keeps_the_others(
    tmp_path: Path, caches: list[ReferenceCache], caplog: pytest.LogCaptureFixture
) -> None:
    damage(caches[0], 0)
    with caplog.at_level(logging.WARNING):
        collect_garbage(tmp_path)
    assert "its entries are computed again" in caplog.text
    assert ReferenceCache(caches[0].folder).has([*entry(1), *entry(2), *entry(3)]).tolist() == [
        False,
        True,
        True,
    ]


def test_gc_removes_what_killed_processes_left_and_nothing_of_living_ones(
    tmp_path: Path, caches: list[ReferenceCache]
) -> None:
    folder = caches[0].folder
    script = (
        "import sys; from pathlib import Path; from dpo_core.reference.cache import temporary_beside as t;"
        "p = t(Path(sys.argv[1]) / 'shard'); p.mkdir(); (p / 'values.npy').write_bytes(bytes(1000)); print(p)"
    )
    process = subprocess.run(
        [sys.executable, "-c", script, str(folder)], capture_output=True, text=True, check=True
    )
    dead, living = Path(process.stdout.strip()), temporary_beside(folder / "shard")
    living.mkdir()
    foreign = folder / "tmp-elsewhere+1+2+0123"
    foreign.mkdir()
    old = folder / "tmp-elsewhere+1+2+4567"
    old.mkdir()
    os.utime(old, (0, 0))
    result = call(tmp_path, "gc", "--dry-run")
    assert f"would remove  {folder.name}/{dead.name} (unfinished)" in result.stdout
    assert dead.exists()
    done = collect_garbage(tmp_path)
    assert sorted(done.leftovers) == sorted(f"{folder.name}/{p.name}" for p in (dead, old))
    assert done.freed_bytes == 1000
    assert [p.exists() for p in (dead, old, living, foreign)] == [False, False, True, True]


def test_gc_removes_caches_that_nobody_used_for_so_long(tmp_path: Path, caches: list[ReferenceCache]) -> None:
    (tmp_path / CACHE_FOLDER / "notes").mkdir()
    age(caches[0], 31)
    age(caches[1], 29)
    assert collect_garbage(tmp_path).unused == [], "only when it is asked for"
    age(caches[0], 31)  # the merge was an addition
    assert collect_garbage(tmp_path, unused_for=30, dry_run=True).unused == [caches[0].folder.name]
    assert caches[0].folder.exists()
    result = call(tmp_path, "gc", "--unused-for", "30")
    assert f"remove  {caches[0].folder.name[:16]} (unused)" in result.stdout
    left = {p.name for p in (tmp_path / CACHE_FOLDER).iterdir()}
    assert left == {caches[1].folder.name, "notes"}


def test_two_writers_never_take_the_same_name(tmp_path: Path) -> None:
    known = facts("d" * 64)
    both = [ReferenceCache(tmp_path / known.key, known) for _ in range(2)]
    for number in range(20):
        both[number % 2].add(entry(number))
    assert ReferenceCache(tmp_path / known.key).has([k for n in range(20) for k in entry(n)]).all()
    both[0].reload()
    assert len(both[0].shards) == 20
