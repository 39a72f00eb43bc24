"""One process of a workspace at a time may change, or rely on, who is champion of a model."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn
from urllib.parse import quote

from dpo_core.errors import StageFailed
from tasks.locks import locked

_LOCK_SECONDS = 900.0


@contextmanager
def alone(workspace: Path, name: str) -> Iterator[None]:
    """Hold the model's champion against other processes on this workspace. A killed holder lets go."""
    path = workspace / "store" / "locks" / f"promotion-{quote(name, safe='')}.lock"

    def busy(who: str) -> NoReturn:
        raise StageFailed(
            f"another promotion of {name} has been at work for {_LOCK_SECONDS / 60:.0f} minutes ({who})",
            "Look for its process, then try again.",
        )

    with locked(path, "locking the champion", busy, patience=_LOCK_SECONDS):
        yield
