"""Looking after a workspace's reference log-probs: what is known, whether it is whole, what may go.

All of it can be computed again, so nothing here can cost more than time.
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
    """What the key stands for; none where an older version did not write it."""
    entries: int
    """Distinct sequences."""
    tokens: int
    """Log-probs stored."""
    bytes: int
    """Bytes on the disk."""
    shards: int
    """Folders that the entries lie in; `gc` makes them one."""
    current: bool
    """Whether this version still reads it; else it lies there until `gc --unused-for`."""
    damaged: int
    """Shards that cannot be opened; `verify` also reads the content of the others."""
    last_used: AwareDatetime
    """Last time that a stage opened it or added to it."""


class Damage(Config):
    """A shard that is not what was written."""

    key: str
    """The cache that it belongs to."""
    shard: str
    """Name of its folder."""
    problem: str
    """What is wrong."""
    removed: bool
    """Whether it was removed, so that its entries are computed again."""


class Verification(Config):
    """What a look at every byte told."""

    shards: int
    """Shards that were read."""
    entries: int
    """Entries of those that are whole."""
    damaged: list[Damage]
    """The others."""


class Collected(Config):
    """What `gc` did, or would do."""

    leftovers: list[str]
    """Unfinished folders of killed processes, relative to the cache."""
    unused: list[str]
    """Keys of the caches that nobody had used for so long."""
    merged: dict[str, int]
    """Shards by key, of the caches whose shards became one."""
    freed_bytes: int
    """Bytes of leftovers and unused caches."""


def list_caches(workspace: str | Path) -> list[CacheSummary]:
    """Every reference's cache, last used first. Reads the keys and shapes only, changes nothing.

    Raises:
        RecipeError: the workspace cannot be read.
    """
    root = _root(workspace)
    with disk_errors(root, "reading the reference cache"):
        found = [_summary(folder) for folder in _folders(root)]
    return sorted(found, key=lambda summary: summary.last_used, reverse=True)


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
        repair: remove the damaged ones; the next run computes their entries again.

    Raises:
        RecipeError: the workspace cannot be read, or not be written for a repair.
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
    """Remove what killed processes left, merge small shards, and remove caches that nobody uses.

    A merge holds one cache's log-probs in memory. A run at work on the same cache loses nothing: at worst it
    computes again what moved under its hands.

    Args:
        unused_for: remove caches not used for so many days; None keeps all.
        dry_run: only say what would be done.

    Raises:
        RecipeError: the workspace cannot be read or written.
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
        for path in leftovers(root):  # of removals that were killed
            left.append(path.name)
            freed += size_of(path)
            if not dry_run:
                remove(path)
    return Collected(leftovers=left, unused=unused, merged=merged, freed_bytes=freed)


def _root(workspace: str | Path) -> Path:
    return open_workspace(workspace) / CACHE_FOLDER


def _folders(root: Path) -> list[Path]:
    """The caches; anything that is not named by a digest is not ours."""
    if not root.is_dir():
        return []
    digits = set("0123456789abcdef")
    return sorted(p for p in root.iterdir() if p.is_dir() and len(p.name) == 64 and set(p.name) <= digits)
