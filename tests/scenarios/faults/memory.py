"""A memory limit that the kernel enforces by killing: a control group below the one that the tests run in."""

import contextlib
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
_LIMITS = ("memory.max", "memory.limit_in_bytes")  # version 2, version 1


class Room:
    """A control group with a limit."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._limit = next(folder / name for name in _LIMITS if (folder / name).exists())

    def limit(self, megabytes: int) -> None:
        self._limit.write_text(str(megabytes << 20))
        with contextlib.suppress(OSError):  # there need be no swap
            (self.folder / "memory.swap.max").write_text("0")

    def peak(self) -> int:
        """The most bytes that its processes have had."""
        names = ("memory.peak", "memory.max_usage_in_bytes")
        return int(next(self.folder / name for name in names if (self.folder / name).exists()).read_text())

    def takes(self, pid: int) -> None:
        """Everything that the process starts from now on is inside too."""
        (self.folder / "cgroup.procs").write_text(str(pid))


@contextmanager
def room() -> Iterator[Room | str]:
    """A room, or why there can be none here."""
    folder, reason = _make()
    if folder is None:
        yield reason
        return
    try:
        yield Room(folder)
    finally:
        for pid in (folder / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), 9)
        for _ in range(100):
            with contextlib.suppress(OSError):
                folder.rmdir()
                break
            time.sleep(0.05)


def _make() -> tuple[Path | None, str]:
    reason = "no control group of the memory controller is mounted"
    for place in _places():
        folder = place / f"dpo-faults-{uuid.uuid4().hex[:8]}"
        try:
            folder.mkdir()
        except OSError as error:
            reason = f"no control group can be made in {place}: {error.strerror}"
            continue
        if any((folder / name).exists() for name in _LIMITS):
            return folder, ""
        folder.rmdir()
        reason = f"the control groups below {place} have no memory controller"
    return None, reason


def _places() -> list[Path]:
    """Where a group may be made: below our own, and (version 2) beside it."""
    places = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            places.append(ROOT / "memory" / path.lstrip("/"))
        elif number == "0":
            places += [ROOT / path.lstrip("/"), (ROOT / path.lstrip("/")).parent]
    return [place for place in places if place.is_dir() and place.is_relative_to(ROOT)]
