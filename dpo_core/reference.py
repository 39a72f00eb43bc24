"""Reference log-probs, one entry per (prompt, completion), addressed by content.

Key of an entry: the exact ids of prompt and completion. Key of a cache folder: the reference's weight files,
the precision, the attention implementation and the definition version. The run's configuration is in neither,
so a changed learning rate recomputes nothing, and a changed weight, template or token what it touches.

A shard is a folder of memory-mapped arrays, sorted by key: `keys` (N,2) uint64, `offsets` (N+1,) int64 and
`values` fp32, the log-prob of each completion token, end to end.
"""

import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_core.errors import StageFailed
from dpo_core.logprobs import DEFINITION_VERSION, Precision, autocast, collate, length_batches, token_logps
from dpo_core.models import digest_file
from dpo_core.tokens import Sequence

log = logging.getLogger(__name__)

_ARRAYS = ("keys", "offsets", "values")


def sequence_key(sequence: Sequence) -> bytes:
    """16 bytes that name one (prompt, completion) by its ids; where the prompt ends is part of it."""
    digest = hashlib.sha256(len(sequence.prompt).to_bytes(8, "little"))
    digest.update(np.asarray(sequence.prompt + sequence.completion, dtype=np.int64).tobytes())
    return digest.digest()[:16]


def reference_key(weights_sha256: str, precision: Precision, attention: str) -> str:
    """Names everything but the text that decides a reference log-prob."""
    text = f"{weights_sha256}\0{precision}\0{attention}\0{DEFINITION_VERSION}"
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class LogpShard:
    """Log-probs looked up by key; opened memory-mapped."""

    keys_N2: NDArray[np.uint64]
    offsets: NDArray[np.int64]
    values: NDArray[np.float32]

    @classmethod
    def build(cls, entries: dict[bytes, NDArray[np.float32]]) -> "LogpShard":
        """A shard in memory from {key: token log-probs}."""
        order = sorted(entries, key=lambda k: tuple(np.frombuffer(k, np.uint64).tolist()))
        keys = np.frombuffer(b"".join(order), np.uint64).reshape(-1, 2)
        lengths = [len(entries[key]) for key in order]
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
        values = np.concatenate([np.zeros(0, np.float32), *(entries[key] for key in order)])
        return cls(keys, offsets, values)

    @classmethod
    def open(cls, folder: Path, *, verify: bool = True) -> "LogpShard":
        """Open a shard.

        Raises:
            StageFailed: a file is missing or not what was written.
        """
        try:
            facts = json.loads((folder / "shard.json").read_text())
            for name in _ARRAYS if verify else ():
                if digest_file(folder / f"{name}.npy") != facts["sha256"][name]:
                    raise StageFailed(f"{folder / name}.npy is not what was written", "Delete the folder")
            return cls(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS))
        except (OSError, ValueError, KeyError) as error:
            raise StageFailed(f"the reference cache {folder} is damaged ({error})", "Delete it") from error

    def save(self, folder: Path) -> None:
        """Write beside and rename, so that a kill leaves no half shard."""
        temporary = folder.with_name(f"tmp-{uuid.uuid4().hex}")
        temporary.mkdir(parents=True)
        arrays: dict[str, NDArray[Any]] = {
            "keys": self.keys_N2,
            "offsets": self.offsets,
            "values": self.values,
        }
        for name, array in arrays.items():
            np.save(temporary / f"{name}.npy", array)
        digests = {name: digest_file(temporary / f"{name}.npy") for name in _ARRAYS}
        (temporary / "shard.json").write_text(json.dumps({"entries": len(self.keys_N2), "sha256": digests}))
        os.replace(temporary, folder)

    def positions(self, keys: Seq[bytes]) -> NDArray[np.int64]:
        """Index of each key, -1 where it is absent. One binary search for all keys together."""
        wanted_K2 = np.frombuffer(b"".join(keys), np.uint64).reshape(-1, 2)
        if not len(self.keys_N2):
            return np.full(len(wanted_K2), -1, np.int64)
        first = np.searchsorted(self.keys_N2[:, 0], wanted_K2[:, 0])
        first = np.minimum(first, len(self.keys_N2) - 1)
        # Two keys that agree in 64 of 128 bits and differ later would be read as absent, never as each other.
        same = (self.keys_N2[first] == wanted_K2).all(axis=1)
        return np.where(same, first, -1)

    def tokens(self, position: int) -> NDArray[np.float32]:
        """Token log-probs of the entry at a position."""
        return np.asarray(self.values[self.offsets[position] : self.offsets[position + 1]])

    def sums(self, keys: Seq[bytes]) -> NDArray[np.float64]:
        """Summed log-prob of each key.

        Raises:
            StageFailed: a key is absent: the cache is of other data, another tokenizer or other settings.
        """
        positions = self.positions(keys)
        if (positions < 0).any():
            raise StageFailed(
                f"{int((positions < 0).sum())} of {len(keys)} sequences have no reference log-prob",
                "The cache belongs to other data or another tokenizer: run the cache stage again",
            )
        return np.add.reduceat(self.values, self.offsets[:-1], dtype=np.float64)[positions]


class ReferenceCache:
    """All shards computed so far for one reference; append-only."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shards: list[LogpShard] = []
        for path in sorted(folder.glob("shard-*")):
            try:
                self.shards.append(LogpShard.open(path))
            except StageFailed as error:
                log.warning("%s; its entries are computed again", error.problem)
                shutil.rmtree(path)

    def find(self, keys: Iterable[bytes]) -> dict[bytes, NDArray[np.float32]]:
        """Token log-probs of the keys that are known."""
        found: dict[bytes, NDArray[np.float32]] = {}
        wanted = list(keys)
        for shard in self.shards:
            missing = [key for key in wanted if key not in found]
            for key, position in zip(missing, shard.positions(missing).tolist(), strict=True):
                if position >= 0:
                    found[key] = shard.tokens(position)
        return found

    def add(self, entries: dict[bytes, NDArray[np.float32]]) -> None:
        """Keep new entries."""
        shard = LogpShard.build(entries)
        shard.save(self.folder / f"shard-{len(list(self.folder.glob('shard-*'))):06d}-{uuid.uuid4().hex[:8]}")
        self.shards.append(shard)


def compute(
    model: Any,
    sequences: Seq[Sequence],
    *,
    precision: Precision,
    token_budget: int,
    keep: Callable[[dict[bytes, NDArray[np.float32]]], None],
    progress: Callable[[int], None] = lambda done: None,
    keep_every: int = 32,
) -> None:
    """Token log-probs of sequences under a frozen model, handed to `keep` every few batches.

    eval mode, no gradients, batched by length.

    Raises:
        StageFailed: a log-prob is not finite.
    """
    import torch

    model.eval()
    device = next(model.parameters()).device
    entries: dict[bytes, NDArray[np.float32]] = {}
    done = 0
    groups = length_batches([len(s) for s in sequences], token_budget)
    for number, group in enumerate(groups, 1):
        batch = collate([sequences[i] for i in group]).to(device)
        with torch.no_grad(), autocast(precision, device):
            logps_BT = token_logps(model, batch)
        if not torch.isfinite(logps_BT).all():
            raise StageFailed("a reference log-prob is not finite", "Check the reference model's weights")
        for row, index in enumerate(group):
            sequence = sequences[index]
            piece = logps_BT[row, len(sequence.prompt) : len(sequence)]
            entries[sequence_key(sequence)] = piece.cpu().numpy()
        done += len(group)
        progress(done)
        if number % keep_every == 0 or number == len(groups):
            keep(entries)
            entries = {}
