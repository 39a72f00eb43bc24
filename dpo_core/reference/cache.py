"""The cache of reference log-probs of a workspace: a folder for each reference, to which shards are added.

    reference_cache/<reference key>/reference.json   the parts of the key; touched at each use
    reference_cache/<reference key>/shard-*/         see `shard`
    reference_cache/<reference key>/tmp-*            being written, or being removed

Several processes may read and add at once: a shard has a unique name and is added by one rename.
"""

import logging
import os
import uuid
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import AwareDatetime, Field, ValidationError

from dpo_core.config import Config
from dpo_core.errors import StageFailed
from dpo_core.reference.shard import (
    Ints,
    LogpShard,
    key_array,
    search,
    sort_order,
)
from dpo_core.system import digest_text, write_atomic
from dpo_core.temporary import discard

log = logging.getLogger(__name__)

FACTS = "reference.json"
# Part of the key of every cache folder: raise it when the values of `compute` may change.
DEFINITION_VERSION = 2


class ReferenceFacts(Config):
    """The reference and settings of a cache folder."""

    weights_sha256: str
    """Digest of the reference's weight files and architecture."""
    precision: str
    """fp32 or bf16."""
    attention: str
    """The attention implementation."""
    definition_version: int = DEFINITION_VERSION
    """Version of the log-prob definition."""
    model: str = ""
    """Description of the reference for people; not part of the key."""
    created_at: AwareDatetime = Field(default_factory=lambda: datetime.now(UTC))
    """When the folder was created; not part of the key."""

    @property
    def key(self) -> str:
        """The name of the folder: a digest of everything that determines a log-prob, except the text."""
        return digest_text(
            f"{self.weights_sha256}\0{self.precision}\0{self.attention}\0{self.definition_version}"
        )


class ReferenceCache:
    """All shards of one reference. Damaged ones are removed, with a warning in the log.

    Args:
        folder: the folder of the reference; created with the first entries or facts.
        facts: written if they are missing; otherwise passing them marks the cache as used.
    """

    def __init__(self, folder: Path, facts: ReferenceFacts | None = None) -> None:
        self.folder = folder
        self._shards: dict[str, LogpShard] = {}
        self._index: tuple[NDArray[np.uint64], Ints, Ints] | None = None
        if facts:
            _write_facts(folder, facts)
        self.reload()

    @property
    def shards(self) -> list[LogpShard]:
        """The shards, oldest name first."""
        return [self._shards[name] for name in sorted(self._shards)]

    def reload(self) -> None:
        """Open the shards that other processes have added since."""
        for path in shard_folders(self.folder):
            if path.name in self._shards:
                continue
            try:
                self._shards[path.name] = LogpShard.open(path)
            except StageFailed as error:
                if path.exists():  # otherwise another process has merged or removed it meanwhile
                    log.warning("%s; its entries are computed again", error.problem)
                    discard(path)
        self._index = None

    def add(self, entries: dict[bytes, NDArray[np.float32]]) -> None:
        """Save new entries to disk."""
        self._add(LogpShard.build(entries))

    def _add(self, shard: LogpShard) -> str:
        name = f"shard-{len(shard_folders(self.folder)):06d}-{uuid.uuid4().hex}"
        shard.save(self.folder / name)
        # Opened from its files, so that the entries do not stay in memory.
        self._shards[name] = LogpShard.open(self.folder / name, verify=False)
        self._index = None
        return name

    def has(self, keys: Sequence[bytes]) -> NDArray[np.bool_]:
        """Whether the cache has each key: (K,)."""
        return search(self._indexed()[0], key_array(keys)) >= 0

    def select(self, keys: Sequence[bytes]) -> LogpShard:
        """A shard in memory with these entries only, each once.

        Raises:
            StageFailed: the cache lacks a key.
        """
        index_N2, shard_N, row_N = self._indexed()
        at_K = search(index_N2, key_array(keys))
        if (at_K < 0).any():
            raise StageFailed(
                f"{int((at_K < 0).sum())} reference log-probs are not in {self.folder}",
                "Resume the run: what is missing is computed",
            )
        shards = self.shards
        return LogpShard.build(
            {key: shards[shard_N[at]].tokens(int(row_N[at])) for key, at in zip(keys, at_K, strict=True)}
        )

    def merge(self) -> int:
        """Rewrite all shards as one; the old ones are removed once it is saved. Returns their number."""
        before = list(self._shards)
        if len(before) > 1:
            used = last_used(self.folder)
            self._add(self.select([row.tobytes() for row in self._indexed()[0]]))
            for name in before:
                del self._shards[name]
                discard(self.folder / name)
            self._index = None
            os.utime(self.folder, (used, used))  # merging is no use
        return len(before)

    def _indexed(self) -> tuple[NDArray[np.uint64], Ints, Ints]:
        """Sorted keys of all shards, with the shard and row of each, so that one search covers them all."""
        if self._index is None:
            shards = self.shards
            sizes = [len(shard) for shard in shards]
            keys_N2 = np.concatenate([np.zeros((0, 2), np.uint64), *(shard.keys_N2 for shard in shards)])
            shard_N = np.repeat(np.arange(len(shards)), sizes)
            row_N = np.concatenate([np.zeros(0, np.int64), *(np.arange(size) for size in sizes)])
            order_N = sort_order(keys_N2)
            self._index = np.asfortranarray(keys_N2.take(order_N, axis=0)), shard_N[order_N], row_N[order_N]
        return self._index


def shard_folders(folder: Path) -> list[Path]:
    """The shards of a cache folder."""
    return sorted(folder.glob("shard-*"))


def read_facts(folder: Path) -> ReferenceFacts | None:
    """The facts of a cache folder; None if they are missing, damaged or of another folder."""
    try:
        facts = ReferenceFacts.model_validate_json((folder / FACTS).read_bytes())
    except (OSError, ValueError, ValidationError):
        return None
    return facts if facts.key == folder.name else None


def last_used(folder: Path) -> float:
    """When a stage last opened the cache, or added to it, in seconds since 1970."""
    times = [folder.stat().st_mtime]
    with suppress(OSError):
        times.append((folder / FACTS).stat().st_mtime)
    return max(times)


def _write_facts(folder: Path, facts: ReferenceFacts) -> None:
    if read_facts(folder):
        os.utime(folder / FACTS)
        return
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / FACTS).is_dir():  # a folder cannot be replaced by a file
        discard(folder / FACTS)
    write_atomic(folder / FACTS, facts.model_dump_json(indent=1))
