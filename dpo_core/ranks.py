"""Work that the ranks of one job share: each rank computes some units, and every rank gets all results.

Results are files in the job's work folder, which every node sees, so a job that was killed, or that starts
again with another number of ranks, computes only what is missing. Ranks exchange nothing else: a slow rank
delays the others only at the end of a map. Which rank computes a unit never changes its result.
"""

import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any, Protocol, TypeVar

from dpo_core.checked_json import read_checked, write_checked
from dpo_core.errors import StageFailed

log = logging.getLogger("dpo")

Unit = TypeVar("Unit")

PARTS = "parts"
PROGRESS = "progress-{rank}"
"""File of the work folder that holds how much a rank has done, in the sizes of `map`."""


class Ranks(Protocol):
    """The ranks that share a computation."""

    rank: int
    world: int

    def map(
        self,
        name: str,
        units: Seq[Unit],
        compute: Callable[[Unit], Any],
        sizes: Seq[int] | None = None,
    ) -> list[Any]:
        """`compute` of every unit, in order. Every rank calls this with the same units in the same order.

        Args:
            name: of this map, for the folder of its results.
            compute: gives plain JSON data.
            sizes: what each unit counts in the job's progress; nothing by default.
        """
        ...

    def check(self) -> None:
        """End the work if it is to be stopped: call this between two steps that are not units of a map."""
        ...

    def discard_results(self) -> None:
        """Remove the results of all maps, so that the next start of the job computes them again."""
        ...

    def advance(self, size: int) -> None:
        """Count so much more as done in the job's progress."""
        ...

    def wait_until(self, complete: Callable[[], bool]) -> None:
        """Wait for what other ranks write."""
        ...


class SingleRank:
    """One process that keeps its results in memory.

    Args:
        progress: called with the sum of the sizes that are done.
    """

    rank, world = 0, 1

    def __init__(self, progress: Callable[[int], None] = lambda done: None) -> None:
        self._progress, self._done = progress, 0

    def map(
        self,
        name: str,
        units: Seq[Unit],
        compute: Callable[[Unit], Any],
        sizes: Seq[int] | None = None,
    ) -> list[Any]:
        results = []
        for index, unit in enumerate(units):
            results.append(compute(unit))
            if sizes:
                self.advance(sizes[index])
        return results

    def check(self) -> None:
        """Nothing stops it."""

    def discard_results(self) -> None:
        """Nothing is kept."""

    def advance(self, size: int) -> None:
        self._done += size
        self._progress(self._done)

    def wait_until(self, complete: Callable[[], bool]) -> None:
        """Nobody else writes anything."""


class JobRanks:
    """The ranks of a job, which keep their results in its work folder.

    Args:
        work: folder of the job, on a disk that all ranks see.
        check: called between two units and while waiting for the others; raises to end the work.
        keep_seconds: how much work a kill may cost a rank.
    """

    def __init__(
        self,
        work: Path,
        rank: int = 0,
        world: int = 1,
        *,
        check: Callable[[], None] = lambda: None,
        keep_seconds: float = 5.0,
    ) -> None:
        self.work, self.rank, self.world = work, rank, world
        self._check, self._keep_seconds = check, keep_seconds
        self._maps = self._done = 0

    def map(
        self,
        name: str,
        units: Seq[Unit],
        compute: Callable[[Unit], Any],
        sizes: Seq[int] | None = None,
    ) -> list[Any]:
        units = list(units)
        self._maps += 1
        digest = hashlib.sha256(repr(units).encode()).hexdigest()[:12]
        parts = _Parts(self.work / PARTS / f"{self._maps:03d}-{name}-{digest}")
        if sizes:
            # Of its own units alone: another rank may have added new ones already, and counts them itself.
            mine = (index for index in parts.results if index % self.world == self.rank)
            self.advance(sum(sizes[index] for index in mine))
        kept_at = time.monotonic()
        new: dict[int, Any] = {}
        try:
            for index in range(self.rank, len(units), self.world):
                if index in parts.results:
                    continue
                self.check()
                new[index] = compute(units[index])
                if sizes:
                    self.advance(sizes[index])
                if time.monotonic() - kept_at >= self._keep_seconds:
                    parts.add(new)
                    new, kept_at = {}, time.monotonic()
        finally:
            parts.add(new)

        def complete() -> bool:
            parts.read()
            return len(parts.results) == len(units)

        self.wait_until(complete)
        return [parts.results[index] for index in range(len(units))]

    def check(self) -> None:
        self._check()

    def discard_results(self) -> None:
        shutil.rmtree(self.work / PARTS, ignore_errors=True)

    def advance(self, size: int) -> None:
        self._done += size
        path = self.work / PROGRESS.format(rank=self.rank)
        temporary = path.with_name(f"new-{path.name}")  # never read half, or the bar would fall back
        temporary.write_text(str(self._done))
        os.replace(temporary, path)

    def wait_until(self, complete: Callable[[], bool]) -> None:
        pause = 0.02
        while not complete():
            self._check()
            time.sleep(pause)
            pause = min(1.0, 1.5 * pause)


class _Parts:
    """The results of one map that are on the disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.results: dict[int, Any] = {}
        self._names: set[str] = set()
        folder.mkdir(parents=True, exist_ok=True)
        # A part that is damaged at the start is computed again; a rank's own new part must not be.
        self.read(strict=False)

    def add(self, results: dict[int, Any]) -> None:
        """Keep new results, on the disk before this returns."""
        if not results:
            return
        name = f"part-{min(results):08d}-{uuid.uuid4().hex[:8]}.json"
        write_checked(self.folder / name, sorted(results.items()))
        self._names.add(name)
        self.results |= {index: json.loads(json.dumps(result)) for index, result in results.items()}

    def read(self, *, strict: bool = True) -> None:
        """Read the parts that appeared since."""
        for path in sorted(self.folder.glob("part-*.json")):
            if path.name in self._names:
                continue
            listed = read_checked(path, "its results are computed again", keep=True)
            if listed is not None:
                self.results |= {int(index): result for index, result in listed}
            elif strict:
                raise StageFailed(f"the results in {path} are damaged", "Check the disk, then resume the run")
            self._names.add(path.name)
