"""One process of a workspace at a time may change, or rely on, who is champion of a model."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from filelock import FileLock, Timeout

from dpo_core.errors import StageFailed
from tasks.workspace import disk_errors

_LOCK_SECONDS = 900.0


@contextmanager
def alone(workspace: Path, name: str) -> Iterator[None]:
    """Hold the model's champion against other processes on this workspace. A killed holder lets go."""
    path = workspace / "store" / "locks" / f"promotion-{quote(name, safe='')}.lock"
    with disk_errors(path, "locking the champion"):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, poll_interval=0.05)
        try:
            lock.acquire(timeout=_LOCK_SECONDS)
        except Timeout as error:
            raise StageFailed(
                f"another promotion of {name} has been at work for {_LOCK_SECONDS / 60:.0f} minutes",
                "Look for its process, then try again.",
            ) from error
    try:
        yield
    finally:
        lock.release()
