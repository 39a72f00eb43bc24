"""Look-ups in a shard compared with a plain dictionary, and their speed for a million pairs."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_core.errors import StageFailed
from dpo_core.reference import sequence_key
from dpo_core.reference import shard as shard_module
from dpo_core.reference.shard import LogpShard
from tests.support.models.logps import random_sequences

Entries = dict[bytes, np.ndarray]

# Few distinct halves, so that keys share their first half, their second half, and order matters in each.
half = st.sampled_from([bytes(8), b"\1" + bytes(7), bytes(7) + b"\1", b"\xff" * 8])
key = st.builds(bytes.__add__, half, half)
# The values follow from one number each: lengths from 0 to 9, hardly two alike.
logps = st.integers(0, 9999).map(lambda n: -np.random.default_rng(n).random(n % 10, np.float32))
stored = st.dictionaries(key, logps, max_size=16)


def assert_same(shard: LogpShard, entries: Entries, requested: list[bytes], first: list[int] | None) -> None:
    cut = [None] * len(requested) if first is None else first
    wanted = [entries[k][:n] for k, n in zip(requested, cut, strict=True)]
    sums = shard.sums(requested, first)
    assert sums.dtype == np.float64
    np.testing.assert_allclose(sums, [float(w.astype(float).sum()) for w in wanted], rtol=1e-12)


@given(stored, st.data())
@settings(max_examples=100, deadline=None)
def test_a_shard_is_a_dictionary(entries: Entries, data: st.DataObject) -> None:
    shard = LogpShard.build(entries)
    requested = data.draw(st.lists(key, max_size=20))
    positions = shard.positions(requested)
    for one, position in zip(requested, positions.tolist(), strict=True):
        assert (position >= 0) == (one in entries)
        if position >= 0:
            np.testing.assert_array_equal(shard.tokens(position), entries[one])
    absent = sum(one not in entries for one in requested)
    if absent:
        with pytest.raises(StageFailed, match=f"{absent} of {len(requested)} sequences"):
            shard.sums(requested)
    known = [one for one in requested if one in entries]
    first = data.draw(st.none() | st.lists(st.integers(0, 12), min_size=len(known), max_size=len(known)))
    assert_same(shard, entries, known, first)


def test_work_in_pieces_is_the_same_work(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(1)
    entries = {bytes(draw.bytes(16)): draw.normal(size=n).astype(np.float32) for n in range(60)}
    shard = LogpShard.build(entries)
    requested = [list(entries)[i] for i in draw.integers(0, 60, 300)]
    first = draw.integers(0, 70, 300).tolist()
    for tokens in (1, 7, 100):
        monkeypatch.setattr(shard_module, "_BLOCK_TOKENS", tokens)
        assert_same(shard, entries, requested, first)


def test_one_count_may_stand_for_all_and_a_wrong_one_is_refused() -> None:
    one, two = bytes(16), b"\1" + bytes(15)
    shard = LogpShard.build({one: np.float32([-1.0, -2.0, -4.0]), two: np.float32([-8.0])})
    assert shard.sums([one, two], first=2).tolist() == [-3.0, -8.0]
    for wrong in ([1], [1, -1], [1.0, 2.0]):
        with pytest.raises(ValueError, match="first"):
            shard.sums([one, two], first=wrong)


def test_a_saved_shard_is_the_same_and_searches_without_a_copy(tmp_path: Path) -> None:
    draw = np.random.default_rng(2)
    entries = {bytes(draw.bytes(16)): draw.normal(size=3).astype(np.float32) for _ in range(50)}
    for contents in (entries, {}):
        folder = tmp_path / str(len(contents))
        LogpShard.build(contents).save(folder)
        shard = LogpShard.open(folder)
        assert len(shard) == len(contents)
        assert_same(shard, contents, list(contents), None)
    opened = LogpShard.open(tmp_path / "50")
    assert isinstance(opened.values, np.memmap)
    assert opened.keys_N2[:, 0].flags.c_contiguous


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("array", ["keys", "offsets", "values"])
def test_a_truncated_array_is_detected(tmp_path: Path, array: str, verify: bool) -> None:
    LogpShard.build({bytes([i]) * 16: np.float32([-1.0, -2.0]) for i in range(9)}).save(tmp_path / "shard")
    file = tmp_path / "shard" / f"{array}.npy"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(StageFailed, match=r"has changed since it was written|damaged"):
        LogpShard.open(tmp_path / "shard", verify=verify)


def test_a_few_keys_of_many_cost_what_a_few_cost(tmp_path: Path) -> None:
    """What is requested is read, not what is stored: 32 MB of values, of which a batch needs 4 kB."""
    synthetic(200_000, 40).save(tmp_path / "shard")
    shard = LogpShard.open(tmp_path / "shard", verify=False)
    requested = [row.tobytes() for row in np.asarray(shard.keys_N2[::8000])]
    shard.sums(requested)
    start = time.perf_counter()
    for _ in range(20):
        shard.sums(requested)
    few = (time.perf_counter() - start) / 20
    start = time.perf_counter()
    shard.sums([row.tobytes() for row in np.asarray(shard.keys_N2)])
    everything = time.perf_counter() - start
    assert few < everything / 20


def synthetic(entries: int, tokens: int) -> LogpShard:
    draw = np.random.default_rng(0)
    keys = draw.integers(0, 2**64, (entries, 2), np.uint64)
    lengths = draw.integers(tokens // 2, tokens * 3 // 2 + 1, entries)
    offsets = shard_module.ends(lengths)
    values = -draw.random(int(offsets[-1]), np.float32)
    return LogpShard(keys[shard_module.sort_order(keys)], offsets, values)


def resident(kind: str) -> float:
    """Megabytes of this process in memory: `Anon` its own, `File` pages of mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith(f"Rss{kind}"))


@pytest.mark.bench
def test_an_epoch_of_a_million_pairs_is_looked_up_in_two_seconds(tmp_path: Path) -> None:
    """2 million sequences, 120 million log-probs, requested in random order."""
    synthetic(2_000_000, 60).save(tmp_path / "shard")
    before = resident("Anon"), resident("File")
    times: dict[str, float] = {}

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        start, used = time.perf_counter(), time.process_time()
        yield
        times[name] = time.perf_counter() - start
        print(f"{name:28} {times[name]:7.3f} s, processor {time.process_time() - used:7.3f} s")

    with timed("open, shapes only"):
        LogpShard.open(tmp_path / "shard", verify=False)
    with timed("open, verified"):
        shard = LogpShard.open(tmp_path / "shard")
    opened = resident("Anon") - before[0], resident("File") - before[1]
    raw = np.random.default_rng(1).permutation(np.asarray(shard.keys_N2)).tobytes()
    keys = [raw[i : i + 16] for i in range(0, len(raw), 16)]
    with timed("sums of the epoch"):
        sums = shard.sums(keys)
    with timed("sums of the first 20 tokens"):
        shard.sums(keys, first=20)
    with timed("sums of 100 batches of 64"):
        for i in range(0, 64 * 100, 64):
            shard.sums(keys[i : i + 64])
    with timed("tokens of the epoch"):
        values, _ = shard.tokens_many(keys)
    sequences = random_sequences(20_000, 386, seed=1, longest=100)
    with timed("keys of 20,000 sequences"):
        for sequence in sequences:
            sequence_key(sequence)
    print(f"resident after open: {opened[0]:.0f} MB own, {opened[1]:.0f} MB mapped file pages")
    assert np.isclose(sums.sum(), values.sum(dtype=np.float64))
    assert times["sums of the epoch"] < 2.0
    assert opened[0] < 100, "the values are mapped, not held"
