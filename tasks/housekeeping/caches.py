"""The caches of a workspace: whatever is removed from them is computed, or asked of a judge, again.

Reference log-probs are a folder for each reference, the others a file for each value. A use renews the time
stamp of the file.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dpo_core.reference.cache import ReferenceCache, last_used, shard_folders
from dpo_core.system import remove
from dpo_core.temporary import discard, leftovers
from tasks.housekeeping.findings import Kept, Removed
from tasks.store.files import CACHE_FOLDER, REPLIES, SUITE_RESULTS, size_of

UNUSED_DAYS = 90.0
"""Default number of days after which an unused entry is removed."""
DAY_SECONDS = 24 * 3600.0


class CleanedCaches(NamedTuple):
    """What was kept, removed and merged, or would be."""

    kept: list[Kept]
    removed: list[Removed]
    merged: dict[str, int]


def clean_caches(workspace: Path, *, unused_days: float, dry_run: bool) -> CleanedCaches:
    """Remove leftovers of killed processes and unused entries, and merge the shards of log-probs.

    Safe while a run uses the caches: at worst it computes some entries again.
    """
    kept: list[Kept] = []
    removed: list[Removed] = []
    merged: dict[str, int] = {}
    limit = time.time() - unused_days * DAY_SECONDS
    for name, entries in _entries(workspace).items():
        stay = [path for path, used in entries if used >= limit]
        going = [path for path, used in entries if used < limit]
        if stay:
            kept.append(Kept(what=_entries_of(stay, name), why="recent", bytes=_bytes(stay)))
        if going:
            removed.append(Removed(what=_entries_of(going, name), why="unused", bytes=_bytes(going)))
        if not dry_run:
            for path in going:
                discard(path)
    root = workspace / CACHE_FOLDER
    for folder in _references(root):
        count = len(shard_folders(folder))
        if count > 1 and last_used(folder) >= limit:
            merged[folder.name] = count if dry_run else ReferenceCache(folder).merge()
    folders = [root, *_references(root), workspace / SUITE_RESULTS, *(workspace / REPLIES).glob("*")]
    for path in [path for folder in folders for path in leftovers(folder)]:
        removed.append(Removed(what=str(path.relative_to(workspace)), why="unfinished", bytes=size_of(path)))
        if not dry_run:
            remove(path)
    return CleanedCaches(kept, removed, merged)


def _entries(workspace: Path) -> dict[str, list[tuple[Path, float]]]:
    """The entries of each cache, with the time of their last use in seconds since 1970."""
    return {
        CACHE_FOLDER: [(path, last_used(path)) for path in _references(workspace / CACHE_FOLDER)],
        SUITE_RESULTS: _files(workspace / SUITE_RESULTS, "*.json"),
        REPLIES: _files(workspace / REPLIES, "*/*.json"),
    }


def _entries_of(paths: list[Path], cache: str) -> str:
    return f"{len(paths)} {'entry' if len(paths) == 1 else 'entries'} of {cache}"


def _bytes(paths: list[Path]) -> int:
    return sum(map(size_of, paths))


def _files(folder: Path, pattern: str) -> list[tuple[Path, float]]:
    return [(path, path.stat().st_mtime) for path in sorted(folder.glob(pattern)) if path.is_file()]


def _references(root: Path) -> Iterator[Path]:
    """The caches of log-probs, one for each reference; folders whose name is not a digest are skipped."""
    digits = set("0123456789abcdef")
    for path in sorted(root.glob("*")):
        if path.is_dir() and len(path.name) == 64 and set(path.name) <= digits:
            yield path
