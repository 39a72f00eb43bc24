"""The reference cache: its values, and how it handles damaged and missing entries."""

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dpo_core.data.tokens.sequences import TokenSequence
from dpo_core.errors import StageFailed
from dpo_core.models.load import load_model
from dpo_core.reference import LogpShard, ReferenceCache, sequence_key
from dpo_core.reference.cache import FACTS, ReferenceFacts, read_facts
from dpo_core.reference.compute import compute
from tests.support.models.logps import full_logps, random_sequences

Entries = dict[bytes, np.ndarray]


def held(cache: ReferenceCache, keys: Iterable[bytes]) -> Entries:
    """Those of the keys that the cache knows, each with its own values."""
    wanted = list(keys)
    known = [key for key, there in zip(wanted, cache.has(wanted), strict=True) if there]
    shard = cache.select(known)
    return {k: shard.tokens(int(i)) for k, i in zip(known, shard.positions(known), strict=True)}


@pytest.fixture
def sequences() -> list[TokenSequence]:
    return random_sequences(40, 386, seed=9)


def test_values_are_those_of_each_sequence_alone(model: Any, sequences: list[TokenSequence]) -> None:
    entries: Entries = {}
    before = torch.get_rng_state()
    compute(
        model,
        sequences,
        precision="fp32",
        token_budget=64,
        save=entries.update,
    )
    assert torch.get_rng_state().equal(before)
    assert set(entries) == {sequence_key(s) for s in sequences}
    with torch.no_grad():
        for sequence in sequences:
            alone = full_logps(model, sequence)
            np.testing.assert_allclose(entries[sequence_key(sequence)], alone, rtol=0, atol=1e-5)


def test_a_shard_gives_back_what_was_put_in(tmp_path: Path, sequences: list[TokenSequence]) -> None:
    draw = np.random.default_rng(0)
    entries = {sequence_key(s): draw.normal(size=len(s.completion)).astype(np.float32) for s in sequences}
    LogpShard.build(entries).save(tmp_path / "shard")
    shard = LogpShard.open(tmp_path / "shard")
    keys = [sequence_key(s) for s in reversed(sequences)]
    for key, position in zip(keys, shard.positions(keys), strict=True):
        np.testing.assert_array_equal(shard.tokens(int(position)), entries[key])
    np.testing.assert_allclose(shard.sums(keys), [entries[k].astype(float).sum() for k in keys], rtol=1e-12)
    assert [p.name for p in tmp_path.iterdir()] == ["shard"], "nothing temporary is left"


def test_a_missing_key_is_refused_with_the_count() -> None:
    known, unknown = sequence_key(TokenSequence((1,), (2,))), sequence_key(TokenSequence((1,), (3,)))
    shard = LogpShard.build({known: np.float32([-1.5])})
    assert shard.sums([known]).tolist() == [-1.5]
    with pytest.raises(StageFailed, match="1 of 2 sequences have no reference log-prob"):
        shard.sums([known, unknown])
    with pytest.raises(StageFailed, match="1 of 1"):
        LogpShard.build({}).sums([known])


def test_a_bad_value_affects_only_its_own_sum() -> None:
    keys = [bytes([i]) + bytes(15) for i in range(3)]
    values = np.float32([-1.0, -2.0]), np.float32([-3.0, np.nan]), np.float32([-4.0])
    sums = LogpShard.build(dict(zip(keys, values, strict=True))).sums(keys)
    np.testing.assert_array_equal(sums, [-3.0, np.nan, -4.0])


def test_keys_with_the_same_first_half_are_distinguished() -> None:
    first = bytes(8) + b"\1" + bytes(7)
    second = bytes(8) + b"\2" + bytes(7)
    shard = LogpShard.build({first: np.float32([-1.0])})
    assert shard.positions([first, second]).tolist() == [0, -1]


@pytest.mark.parametrize("array", ["keys", "offsets", "values"])
@pytest.mark.parametrize("place", [0, -1])
def test_a_changed_byte_is_detected(tmp_path: Path, array: str, place: int) -> None:
    LogpShard.build({bytes(16): np.float32([-1.0, -2.0])}).save(tmp_path / "shard")
    file = tmp_path / "shard" / f"{array}.npy"
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)
    with pytest.raises(StageFailed, match=r"has changed since it was written"):
        LogpShard.open(tmp_path / "shard")


@pytest.mark.parametrize("lost", ["shard.json", "values.npy"])
def test_a_missing_file_is_detected(tmp_path: Path, lost: str) -> None:
    LogpShard.build({bytes(16): np.float32([-1.0])}).save(tmp_path / "shard")
    (tmp_path / "shard" / lost).unlink()
    with pytest.raises(StageFailed, match="is damaged"):
        LogpShard.open(tmp_path / "shard")


def test_a_cache_skips_incomplete_and_damaged_shards(tmp_path: Path) -> None:
    good, bad = bytes(15) + b"\1", bytes(15) + b"\2"
    cache = ReferenceCache(tmp_path)
    cache.add({good: np.float32([-1.0])})
    cache.add({bad: np.float32([-2.0])})
    damaged = sorted(tmp_path.glob("shard-000001-*"))[0]
    (damaged / "values.npy").write_bytes(b"")
    half = tmp_path / "tmp-0123"
    half.mkdir()
    (half / "keys.npy").write_bytes(b"half")
    again = ReferenceCache(tmp_path)
    assert list(held(again, [good, bad])) == [good]
    assert not damaged.exists(), "its entries are to be computed again"
    again.add({bad: np.float32([-2.0])})
    assert set(held(ReferenceCache(tmp_path), [good, bad])) == {good, bad}


class Killed(Exception):
    pass


def test_resuming_after_a_kill_gives_the_same_bits(
    model: Any, sequences: list[TokenSequence], tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"precision": "fp32", "token_budget": 64}
    straight: Entries = {}
    compute(model, sequences, save=straight.update, **settings)
    cache = ReferenceCache(tmp_path)

    def keep_once(entries: Entries) -> None:
        if cache.shards:
            raise Killed
        cache.add(entries)

    with pytest.raises(Killed):
        compute(model, sequences, save=keep_once, **settings)
    cache = ReferenceCache(tmp_path)
    known = held(cache, straight)
    assert 0 < len(known) < len(straight)
    missing = [s for s in sequences if sequence_key(s) not in known]
    computed: Entries = {}

    def add(entries: Entries) -> None:
        computed.update(entries)
        cache.add(entries)

    compute(model, missing, save=add, **settings)
    assert len(computed) == len(missing) < len(sequences)
    cached = held(ReferenceCache(tmp_path), straight)
    assert set(cached) == set(straight)
    for key, values in straight.items():
        np.testing.assert_array_equal(cached[key], values)


def test_only_changed_sequences_are_missing(tmp_path: Path, sequences: list[TokenSequence]) -> None:
    cache = ReferenceCache(tmp_path)
    cache.add({sequence_key(s): np.zeros(len(s.completion), np.float32) for s in sequences})
    first = sequences[0]
    changed = [
        TokenSequence(first.prompt, (*first.completion[:-1], first.completion[-1] ^ 1)),
        *sequences[1:],
    ]
    cached = held(ReferenceCache(tmp_path), [sequence_key(s) for s in reversed(changed)])
    assert [s for s in changed if sequence_key(s) not in cached] == changed[:1]


def test_values_that_are_not_finite_are_refused(tiny: Path) -> None:
    broken = load_model(tiny)
    with torch.no_grad():
        broken.get_input_embeddings().weight[7] = float("nan")
    with pytest.raises(StageFailed, match="not finite"):
        compute(
            broken, [TokenSequence((7,), (5,))], precision="fp32", token_budget=64, save=lambda entries: None
        )


def test_many_keys_are_looked_up_quickly(tmp_path: Path) -> None:
    count = 200_000
    raw = np.random.default_rng(0).integers(0, 2**63, size=(count, 2), dtype=np.uint64).tobytes()
    keys = [raw[i : i + 16] for i in range(0, len(raw), 16)]
    value = np.float32([-1.0, -0.5])
    LogpShard.build(dict.fromkeys(keys, value)).save(tmp_path / "shard")
    shard = LogpShard.open(tmp_path / "shard")
    start = time.process_time()
    sums = shard.sums(keys[::-1])
    seconds = time.process_time() - start
    assert sums.shape == (count,)
    assert (sums == -1.5).all()
    assert seconds < 5, "one by one it would be minutes"


def test_the_shard_says_how_many_entries_it_holds(tmp_path: Path) -> None:
    LogpShard.build({bytes(16): np.float32([-1.0])}).save(tmp_path / "shard")
    assert json.loads((tmp_path / "shard" / "shard.json").read_text())["entries"] == 1


@pytest.mark.parametrize("damage", ["empty", "folder"])
def test_damaged_facts_are_written_again(tmp_path: Path, damage: str) -> None:
    facts = ReferenceFacts(weights_sha256="a" * 64, precision="fp32", attention="eager", definition_version=1)
    path = tmp_path / facts.key / FACTS
    ReferenceCache(path.parent, facts)
    path.unlink()
    if damage == "folder":
        path.mkdir()
        (path / "file").touch()
    else:
        path.touch()
    assert read_facts(path.parent) is None
    ReferenceCache(path.parent, facts)
    assert read_facts(path.parent) is not None
