"""The cache of reference log-probs of a workspace: a folder for each reference, to which shards are added.

    reference_cache/<reference key>/reference.json   the parts of the key; touched at each use
    reference_cache/<reference key>/shard-*/         see `shard`
    reference_cache/<reference key>/tmp-*            being written, or being removed

Several processes may read and add at once: a shard has a unique name and is added by one rename.
"""

import hashlib
import logging
import os
import shutil
import socket
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import psutil
from numpy.typing import NDArray
from pydantic import AwareDatetime, Field, ValidationError

from dpo_core.config import Config
from dpo_core.errors import StageFailed
from dpo_core.reference.shard import (
    TEMPORARY,
    Ints,
    LogpShard,
    copy_rows,
    ends,
    find,
    key_array,
    search,
    sort_order,
    temporary_beside,
)
from dpo_core.system import process_start

log = logging.getLogger(__name__)

FACTS = "reference.json"
# The process of a temporary file of another machine cannot be checked; it counts as dead after this time.
_FOREIGN_SECONDS = 24 * 3600.0


class ReferenceFacts(Config):
    """The reference and settings of a cache folder."""

    weights_sha256: str
    """Digest of the reference's weight files and architecture."""
    precision: str
    """fp32 or bf16."""
    attention: str
    """The attention implementation."""
    definition_version: int
    """Version of the log-prob definition."""
    model: str = ""
    """Description of the reference for people; not part of the key."""
    created_at: AwareDatetime = Field(default_factory=lambda: datetime.now(UTC))
    """When the folder was created; not part of the key."""

    @property
    def key(self) -> str:
        """The name of the folder: a digest of everything that determines a log-prob, except the text."""
        text = f"{self.weights_sha256}\0{self.precision}\0{self.attention}\0{self.definition_version}"
        return hashlib.sha256(text.encode()).hexdigest()


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
        keys_K2 = key_array(keys)
        keys_K2 = keys_K2.take(sort_order(keys_K2), axis=0)
        first_occurrence = np.ones(len(keys_K2), bool)
        first_occurrence[1:] = (keys_K2[1:] != keys_K2[:-1]).any(axis=1)
        keys_K2 = keys_K2[first_occurrence]
        index_N2, shard_N, row_N = self._indexed()
        at_K = find(index_N2, keys_K2)
        if (at_K < 0).any():
            raise StageFailed(
                f"{int((at_K < 0).sum())} reference log-probs are not in {self.folder}",
                "Resume the run: what is missing is computed",
            )
        return self._gather(keys_K2, shard_N[at_K], row_N[at_K])

    def _gather(self, keys_K2: NDArray[np.uint64], shard_K: Ints, row_K: Ints) -> LogpShard:
        counts_K = np.zeros(len(keys_K2), np.int64)
        starts_K = np.zeros(len(keys_K2), np.int64)
        by_shard = np.argsort(shard_K, kind="stable")
        cuts = np.searchsorted(shard_K[by_shard], np.arange(1, len(self._shards)))
        parts = list(zip(self.shards, np.split(by_shard, cuts), strict=False))  # no shards: one empty part
        for shard, part in parts:
            starts_K[part] = shard.offsets[row_K[part]]
            counts_K[part] = shard.offsets[row_K[part] + 1] - starts_K[part]
        offsets = ends(counts_K)
        values = np.empty(int(offsets[-1]), np.float32)
        for shard, part in parts:
            copy_rows(shard.values, starts_K[part], counts_K[part], values, offsets[:-1][part])
        return LogpShard(keys_K2, offsets, values)

    def merge(self) -> int:
        """Rewrite all shards as one; the old ones are removed once it is saved. Returns their number."""
        before = list(self._shards)
        if len(before) > 1:
            self._add(self.select([row.tobytes() for row in self._indexed()[0]]))
            for name in before:
                del self._shards[name]
                discard(self.folder / name)
            self._index = None
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


def last_used(folder: Path) -> datetime:
    """When a stage last opened the cache, or added to it."""
    times = [folder.stat().st_mtime]
    with suppress(OSError):
        times.append((folder / FACTS).stat().st_mtime)
    return datetime.fromtimestamp(max(times), UTC)


def _write_facts(folder: Path, facts: ReferenceFacts) -> None:
    if read_facts(folder):
        os.utime(folder / FACTS)
        return
    folder.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(folder / FACTS)
    temporary.write_text(facts.model_dump_json(indent=1))
    if (folder / FACTS).is_dir():  # os.replace cannot replace a folder by a file
        discard(folder / FACTS)
    os.replace(temporary, folder / FACTS)


def discard(path: Path) -> None:
    """Remove a file or folder. It is renamed first, so that no process opens an incomplete one."""
    hidden = temporary_beside(path)
    with suppress(FileNotFoundError):
        os.rename(path, hidden)
    remove(hidden)


def remove(path: Path) -> None:
    """Remove a file, folder or link, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def leftovers(folder: Path) -> list[Path]:
    """Temporary files of killed processes, without those of live ones."""
    return [path for path in sorted(folder.glob(f"{TEMPORARY}*")) if not _has_owner(path)]


def _has_owner(temporary: Path) -> bool:
    try:
        host, pid, born, _ = temporary.name.removeprefix(TEMPORARY).rsplit("+", 3)
        if host != socket.gethostname():
            return time.time() - temporary.stat().st_mtime < _FOREIGN_SECONDS
        return process_start(int(pid)) == int(born)
    except (FileNotFoundError, ValueError, psutil.NoSuchProcess):
        return False
