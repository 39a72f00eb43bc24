"""A shard of the cache: token log-probs of sequences in a folder of memory-mapped arrays, looked up by key.

`keys` (N,2) uint64, sorted; `offsets` (N+1,) int64; `values` fp32, the log-probs of the completion tokens of
all entries; `shard.json` their digests. Shapes: N entries, K requested keys.

Look-ups are vectorised, and their cost depends on the number of requested keys, not of entries. Requested
keys are sorted first, so that the files are read from front to back.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dpo_core.errors import StageFailed
from dpo_core.system import digest_file
from dpo_core.temporary import new_folder

_ARRAYS = ("keys", "offsets", "values")
# Tokens processed at a time, so that intermediate arrays fit the processor's cache.
_BLOCK_TOKENS = 1 << 18

Ints = NDArray[np.int64]
_REPAIR = "Resume the run: damaged shards are removed, and what is missing is computed again"


@dataclass(frozen=True)
class LogpShard:
    """Log-probs looked up by key; opened memory-mapped."""

    keys_N2: NDArray[np.uint64]
    offsets: Ints
    values: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.keys_N2)

    @classmethod
    def build(cls, entries: dict[bytes, NDArray[np.float32]]) -> "LogpShard":
        """A shard in memory from {key: token log-probs}."""
        keys_N2 = key_array(list(entries))
        order_N = sort_order(keys_N2)
        rows = list(entries.values())
        lengths = [len(rows[i]) for i in order_N]
        values = np.concatenate([np.zeros(0, np.float32), *(rows[i] for i in order_N)])
        return cls(keys_N2[order_N], ends(np.array(lengths, np.int64)), values)

    @classmethod
    def open(cls, folder: Path, *, verify: bool = True) -> "LogpShard":
        """Open a shard.

        Args:
            verify: read the files and compare them with their digests; otherwise check only the shapes.

        Raises:
            StageFailed: a file is missing, has changed, or does not fit the others.
        """
        try:
            facts = json.loads((folder / "shard.json").read_text())
            for name in _ARRAYS if verify else ():
                if digest_file(folder / f"{name}.npy") != facts["sha256"][name]:
                    raise StageFailed(f"{folder / name}.npy has changed since it was written", _REPAIR)
            shard = cls(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS))
            if shard.keys_N2.shape != (facts["entries"], 2) or len(shard.values) != facts["tokens"]:
                raise ValueError(f"its arrays do not hold {facts['entries']} entries")
        except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
            raise StageFailed(
                f"the shard {folder} of reference log-probs is damaged ({error})", _REPAIR
            ) from error
        return shard

    def save(self, folder: Path) -> None:
        """Write to a temporary folder and rename it, so that a kill leaves no incomplete shard."""
        arrays: dict[str, NDArray[Any]] = {
            # In column order: a search reads the first halves of the keys, which are then contiguous.
            "keys": np.asfortranarray(self.keys_N2),
            "offsets": self.offsets,
            "values": self.values,
        }
        with new_folder(folder) as temporary:
            for name, array in arrays.items():
                np.save(temporary / f"{name}.npy", array)
            digests = {name: digest_file(temporary / f"{name}.npy") for name in _ARRAYS}
            facts = {"entries": len(self), "tokens": len(self.values), "sha256": digests}
            (temporary / "shard.json").write_text(json.dumps(facts))

    def positions(self, keys: Sequence[bytes]) -> Ints:
        """Index of each key, -1 where it is absent: (K,)."""
        return search(self.keys_N2, key_array(keys))

    def tokens(self, position: int) -> NDArray[np.float32]:
        """Token log-probs of the entry at a position."""
        return np.asarray(self.values[self.offsets[position] : self.offsets[position + 1]])

    def sums(self, keys: Sequence[bytes], first: ArrayLike | None = None) -> NDArray[np.float64]:
        """Summed log-prob of each key, in nats: (K,).

        Args:
            first: number of tokens from the start of each entry; one number or (K,). None: all.

        Raises:
            StageFailed: a key is absent: the cache has other data, another tokenizer or other settings.
        """
        order_K, starts_K, counts_K = self._spans(keys, first)
        sums_K = np.zeros(len(order_K))
        # Without empty spans, for which reduceat would return the value that follows them.
        filled_K = counts_K > 0
        rows, starts, counts = order_K[filled_K], starts_K[filled_K], counts_K[filled_K]
        for part in blocks(counts):
            sums_K[rows[part]] = _sum_spans(self.values, starts[part], counts[part])
        return sums_K

    def _spans(self, keys: Sequence[bytes], first: ArrayLike | None) -> tuple[Ints, Ints, Ints]:
        """The order of the keys in the file, and the start and number of the requested tokens of each."""
        keys_K2 = key_array(keys)
        order_K = np.argsort(keys_K2[:, 0])
        at_K = find(self.keys_N2, keys_K2.take(order_K, axis=0))
        absent = int((at_K < 0).sum())
        if absent:
            raise StageFailed(
                f"{absent} of {len(keys)} sequences have no reference log-prob",
                "It is of other data or another tokenizer. Remove the folder cache-reference in store/index "
                "of the workspace, then resume the run",
            )
        starts_K = self.offsets[at_K]
        counts_K = self.offsets[at_K + 1] - starts_K
        if first is not None:
            limit = np.asarray(first)
            integers = np.issubdtype(limit.dtype, np.integer) or not limit.size
            if not integers or (limit < 0).any():
                raise ValueError("`first` counts tokens: whole numbers from 0 on")
            if limit.ndim and limit.shape != counts_K.shape:
                raise ValueError(f"`first` holds {limit.shape} counts for {len(keys)} keys")
            counts_K = np.minimum(counts_K, limit[order_K] if limit.ndim else limit).astype(np.int64)
        return order_K, starts_K, counts_K


def key_array(keys: Sequence[bytes]) -> NDArray[np.uint64]:
    """Keys of 16 bytes as (K,2) numbers."""
    return np.frombuffer(b"".join(keys), np.uint64).reshape(-1, 2)


def sort_order(keys_N2: NDArray[np.uint64]) -> Ints:
    """The order that sorts keys by their first half, then their second; equal keys keep their order."""
    first_N = np.ascontiguousarray(keys_N2[:, 0])
    order_N = np.argsort(first_N)
    sorted_N = first_N[order_N]
    if (sorted_N[1:] == sorted_N[:-1]).any():  # rare among digests, and three times as slow
        return np.lexsort((keys_N2[:, 1], first_N))
    return order_N


def search(keys_N2: NDArray[np.uint64], keys_K2: NDArray[np.uint64]) -> Ints:
    """Index of each requested key among sorted keys (of equal ones the first), -1 if it is absent: (K,)."""
    # In sorted order, so that the file is read from front to back.
    order_K = np.argsort(keys_K2[:, 0])
    return _scattered(order_K, find(keys_N2, keys_K2.take(order_K, axis=0)))


def find(keys_N2: NDArray[np.uint64], keys_K2: NDArray[np.uint64]) -> Ints:
    """The result of `search`, fast if the requested keys are sorted by their first half."""
    first_N, second_N = keys_N2[:, 0], keys_N2[:, 1]
    index_K = np.full(len(keys_K2), -1, np.int64)
    pending = np.arange(len(keys_K2))
    at = np.searchsorted(first_N, keys_K2[:, 0])
    while len(pending):
        # Keys with the same first half are adjacent; advance until the second half is equal too.
        near = at < len(keys_N2)
        at, pending = at[near], pending[near]
        near = first_N[at] == keys_K2[pending, 0]
        at, pending = at[near], pending[near]
        hit = second_N[at] == keys_K2[pending, 1]
        index_K[pending[hit]] = at[hit]
        at, pending = at[~hit] + 1, pending[~hit]
    return index_K


def _scattered(order_K: Ints, values_K: Ints) -> Ints:
    """The inverse of `values_K[order_K]`."""
    out_K = np.empty_like(values_K)
    out_K[order_K] = values_K
    return out_K


def ends(counts: Ints) -> Ints:
    """Offsets of concatenated rows: (K,) counts to (K+1,), from 0 to their total."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])


def spread(starts: Ints, counts: Ints) -> Ints:
    """Index of every element of the spans [start, start + count), in order."""
    offsets = ends(counts)
    return np.repeat(starts - offsets[:-1], counts) + np.arange(offsets[-1])


def blocks(counts: Ints) -> Iterator[slice]:
    """Slices of rows with about `_BLOCK_TOKENS` elements each, at least one row."""
    stops = np.cumsum(counts)
    start = 0
    while start < len(counts):
        limit = stops[start] - counts[start] + _BLOCK_TOKENS
        stop = max(start + 1, int(np.searchsorted(stops, limit, side="right")))
        yield slice(start, stop)
        start = stop


def _sum_spans(values: NDArray[np.float32], starts: Ints, counts: Ints) -> NDArray[np.float64]:
    """Sum of each span, none of which is empty."""
    stops = starts + counts
    if (starts[1:] >= stops[:-1]).all() and stops[-1] - starts[0] <= 2 * counts.sum():
        # There is little between the spans: sum it too, and leave those sums (every second) out.
        marks = np.column_stack([starts, stops]).ravel()[:-1] - starts[0]
        between = values[starts[0] : stops[-1]]
        return np.add.reduceat(between, marks, dtype=np.float64)[::2]
    return np.add.reduceat(values[spread(starts, counts)], ends(counts)[:-1], dtype=np.float64)
