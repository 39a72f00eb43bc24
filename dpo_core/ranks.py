"""Distributes the work of one job over its ranks: each computes some units, and every rank gets all results.

Results are files in the job's work folder, which all nodes share. A job that was killed, or that starts again
with another number of ranks, therefore computes only what is missing. Ranks exchange nothing else: a slow
rank delays the others only at the end of a map. The result of a unit does not depend on its rank.
"""

import json
import logging
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from dpo_core.checked_json import read_checked, write_checked
from dpo_core.errors import StageFailed
from dpo_core.system import digest_text, write_atomic

log = logging.getLogger("dpo")

Unit = TypeVar("Unit")

PARTS = "parts"
PROGRESS = "progress-{rank}"
"""File of the work folder with the progress of a rank, in the sizes of `map`."""


class SingleRank:
    """A single process, which keeps its results in memory.

    Args:
        progress: called with the sum of the sizes of the finished units.
    """

    def __init__(self, progress: Callable[[int], None] = lambda done: None) -> None:
        self.rank, self.world = 0, 1
        self._progress, self._done = progress, 0

    def map(
        self,
        name: str,
        units: Sequence[Unit],
        compute: Callable[[Unit], Any],
        sizes: Sequence[int] | None = None,
    ) -> list[Any]:
        """The results of all units, in order. Every rank calls this with the same units in the same order.

        Args:
            name: name of this map, for the folder of its results.
            compute: the function of a unit; returns plain JSON data.
            sizes: size of each unit in the job's progress; by default units are not counted.
        """
        results = []
        for index, unit in enumerate(units):
            results.append(compute(unit))
            if sizes:
                self.advance(sizes[index])
        return results

    def check(self) -> None:
        """Raise `Stopped` after a stop signal. Call this between steps that are not units of a map."""

    def discard_results(self) -> None:
        """Remove the results of all maps, so that the next start of the job computes them again."""

    def advance(self, size: int) -> None:
        """Add to the job's progress."""
        self._done += size
        self._progress(self._done)

    def wait_until(self, complete: Callable[[], bool]) -> None:
        """Wait for files that other ranks write."""


Ranks = SingleRank
"""The ranks that share a computation: one process, or those of a job."""


class JobRanks(SingleRank):
    """The ranks of a job, which save their results in its work folder.

    Args:
        work: folder of the job, on a disk that all ranks share.
        check: called between units and while waiting for the other ranks; may raise to end the work.
        keep_seconds: seconds between saves: the work that a rank can lose by a kill.
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
        super().__init__(self._write_progress)
        self.work, self.rank, self.world = work, rank, world
        self._check, self._keep_seconds = check, keep_seconds
        self._maps = 0

    def map(
        self,
        name: str,
        units: Sequence[Unit],
        compute: Callable[[Unit], Any],
        sizes: Sequence[int] | None = None,
    ) -> list[Any]:
        units = list(units)
        self._maps += 1
        digest = digest_text(repr(units))[:12]
        parts = _Parts(self.work / PARTS / f"{self._maps:03d}-{name}-{digest}")
        if sizes:
            # Only its own units: another rank may have saved some already, and counts them itself.
            own = (index for index in parts.results if index % self.world == self.rank)
            self.advance(sum(sizes[index] for index in own))
        saved_at = time.monotonic()
        new: dict[int, Any] = {}
        try:
            for index in range(self.rank, len(units), self.world):
                if index in parts.results:
                    continue
                self.check()
                new[index] = compute(units[index])
                if sizes:
                    self.advance(sizes[index])
                if time.monotonic() - saved_at >= self._keep_seconds:
                    parts.add(new)
                    new, saved_at = {}, time.monotonic()
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

    def _write_progress(self, done: int) -> None:
        path = self.work / PROGRESS.format(rank=self.rank)
        write_atomic(path, str(done), durable=False)  # a reader must not see an incomplete number

    def wait_until(self, complete: Callable[[], bool]) -> None:
        pause = 0.02
        while not complete():
            self._check()
            time.sleep(pause)
            pause = min(1.0, 1.5 * pause)


class _Parts:
    """The saved results of one map."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.results: dict[int, Any] = {}
        self._names: set[str] = set()
        folder.mkdir(parents=True, exist_ok=True)
        # A part that is damaged at the start is computed again; one of another rank later is an error.
        self.read(strict=False)

    def add(self, results: dict[int, Any]) -> None:
        """Save new results to disk."""
        if not results:
            return
        name = f"part-{min(results):08d}-{uuid.uuid4().hex[:8]}.json"
        write_checked(self.folder / name, sorted(results.items()))
        self._names.add(name)
        self.results |= {index: json.loads(json.dumps(result)) for index, result in results.items()}

    def read(self, *, strict: bool = True) -> None:
        """Read the parts that were added since the last call."""
        for path in sorted(self.folder.glob("part-*.json")):
            if path.name in self._names:
                continue
            results = read_checked(path, "its results are computed again", keep=True)
            if results is not None:
                self.results |= {int(index): result for index, result in results}
            elif strict:
                raise StageFailed(f"the results in {path} are damaged", "Check the disk, then resume the run")
            self._names.add(path.name)
