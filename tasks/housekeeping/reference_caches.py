"""Maintains a workspace's caches of reference log-probs: list, verify, merge and remove them.

Every entry can be computed again, so an error here costs time but no result.
"""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
from pydantic import AwareDatetime

from dpo_core.config import Config
from dpo_core.errors import StageFailed
from dpo_core.reference.cache import (
    ReferenceCache,
    ReferenceFacts,
    discard,
    last_used,
    leftovers,
    read_facts,
    remove,
    shard_folders,
)
from dpo_core.reference.keys import DEFINITION_VERSION
from dpo_core.reference.shard import LogpShard
from tasks.store.files import CACHE_FOLDER, disk_errors, open_workspace, size_of


class CacheSummary(Config):
    """One reference's cache."""

    key: str
    """Name of the folder: a digest of weights, precision, attention and definition version."""
    reference: ReferenceFacts | None
    """The weights and settings behind the key; None for caches of older versions."""
    entries: int
    """Distinct sequences."""
    tokens: int
    """Log-probs stored."""
    bytes: int
    """Bytes on disk."""
    shards: int
    """Number of folders that hold the entries; `gc` merges them."""
    current: bool
    """Whether this version of the package reads the cache. Others are removed by `gc --unused-for`."""
    damaged: int
    """Shards that cannot be opened; `verify` also reads the content of the others."""
    last_used: AwareDatetime
    """Last time that a stage read or extended it."""


class Damage(Config):
    """A damaged shard."""

    key: str
    """The cache's key."""
    shard: str
    """Name of the shard's folder."""
    problem: str
    removed: bool
    """Whether the shard was removed, so that its entries are computed again."""


class Verification(Config):
    """The result of comparing every shard with its digests."""

    shards: int
    """Number of shards read."""
    entries: int
    """Number of entries in intact shards."""
    damaged: list[Damage]


class Collected(Config):
    """The result of a garbage collection, or of its dry run."""

    leftovers: list[str]
    """Unfinished folders of killed processes, relative to the cache."""
    unused: list[str]
    """Keys of removed caches, which were unused for too long."""
    merged: dict[str, int]
    """Number of shards merged into one, by cache key."""
    freed_bytes: int
    """Bytes of leftovers and unused caches."""


def list_caches(workspace: str | Path) -> list[CacheSummary]:
    """All caches, most recently used first. Reads only keys and shapes; changes nothing.

    Raises:
        RecipeError: the workspace is not readable.
    """
    root = _root(workspace)
    with disk_errors(root, "reading the reference cache"):
        summaries = [_summary(folder) for folder in _folders(root)]
    return sorted(summaries, key=lambda summary: summary.last_used, reverse=True)


def _summary(folder: Path) -> CacheSummary:
    opened, damaged = [], 0
    for path in shard_folders(folder):
        try:
            opened.append(LogpShard.open(path, verify=False))
        except StageFailed:
            damaged += 1
    keys = [np.asarray(shard.keys_N2) for shard in opened]
    facts = read_facts(folder)
    return CacheSummary(
        key=folder.name,
        reference=facts,
        current=facts is not None and facts.definition_version == DEFINITION_VERSION,
        entries=len(np.unique(np.concatenate(keys), axis=0)) if keys else 0,
        tokens=sum(len(shard.values) for shard in opened),
        bytes=size_of(folder),
        shards=len(opened) + damaged,
        damaged=damaged,
        last_used=last_used(folder),
    )


def verify_caches(workspace: str | Path, *, repair: bool = False) -> Verification:
    """Read every shard and compare it with its digests.

    Args:
        repair: remove damaged shards; the next run computes their entries again.

    Raises:
        RecipeError: the workspace is not readable, or not writable for a repair.
    """
    root = _root(workspace)
    shards, entries, damaged = 0, 0, []
    with disk_errors(root, "verifying the reference cache"):
        for folder in _folders(root):
            for path in shard_folders(folder):
                try:
                    entries += len(LogpShard.open(path))
                except StageFailed as error:
                    if not path.exists():  # merged or removed by another process meanwhile
                        continue
                    if repair:
                        discard(path)
                    damaged.append(
                        Damage(key=folder.name, shard=path.name, problem=error.problem, removed=repair)
                    )
                shards += 1
    return Verification(shards=shards, entries=entries, damaged=damaged)


def collect_garbage(
    workspace: str | Path, *, unused_for: float | None = None, dry_run: bool = False
) -> Collected:
    """Remove leftovers of killed processes, merge shards, and remove unused caches.

    A merge holds one cache's log-probs in memory. It is safe while a run uses the same cache: at worst the
    run computes some entries again.

    Args:
        unused_for: remove caches that were not used for this many days; None keeps all.
        dry_run: change nothing, only return what would be removed.

    Raises:
        RecipeError: the workspace is not readable or writable.
    """
    root = _root(workspace)
    left: list[str] = []
    unused: list[str] = []
    merged: dict[str, int] = {}
    freed = 0
    with disk_errors(root, "cleaning the reference cache"):
        for folder in _folders(root):
            if unused_for is not None and datetime.now(UTC) - last_used(folder) >= timedelta(days=unused_for):
                unused.append(folder.name)
                freed += size_of(folder)
                if not dry_run:
                    discard(folder)
                continue
            for path in leftovers(folder):
                left.append(str(path.relative_to(root)))
                freed += size_of(path)
                if not dry_run:
                    remove(path)
            count = len(shard_folders(folder))
            if count > 1:
                merged[folder.name] = count if dry_run else ReferenceCache(folder).merge()
        for path in leftovers(root):  # left by interrupted removals
            left.append(path.name)
            freed += size_of(path)
            if not dry_run:
                remove(path)
    return Collected(leftovers=left, unused=unused, merged=merged, freed_bytes=freed)


def _root(workspace: str | Path) -> Path:
    return open_workspace(workspace) / CACHE_FOLDER


def _folders(root: Path) -> list[Path]:
    """The folders of the caches; folders whose name is not a digest are skipped."""
    if not root.is_dir():
        return []
    digits = set("0123456789abcdef")
    return sorted(p for p in root.iterdir() if p.is_dir() and len(p.name) == 64 and set(p.name) <= digits)
