"""The outbox of MLflow writes: none is lost to a server's nap, and none holds up a stage.

While MLflow does not answer, writes wait in their order and the caller goes on. What still waits when a stage
or the run ends is put on the disk, and the next run of the workspace sends it:

    tracking_outbox/<parent run>/writes.json    the writes, each a method of a run with its arguments
    tracking_outbox/<parent run>/files/         copies of the files that they upload or read
"""

import json
import logging
import shutil
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from dpo_core.redaction import hidden
from dpo_core.system import write_atomic
from tasks.signals import undisturbed
from tasks.store.files import says_disk_full, says_read_only

log = logging.getLogger(__name__)

PATIENCE = {"FINISHED": 30.0, "FAILED": 30.0, "KILLED": 5.0}  # seconds to wait for MLflow when a run ends
STAGE_PATIENCE = 5.0  # when a stage ends: what waits longer is safe on the disk
FOLDER = "tracking_outbox"
_WRITES = "writes.json"
_PAUSE = (0.5, 15.0)  # first and longest pause between two attempts, seconds
_PROBE_SECONDS = 2.0
_REFUSALS = {
    "INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS", "INVALID_STATE",
    "BAD_REQUEST", "PERMISSION_DENIED", "UNAUTHENTICATED", "ENDPOINT_NOT_FOUND", "NOT_IMPLEMENTED",
}  # fmt: skip


def one_line(error: BaseException) -> str:
    # Without passwords of a database, in logs and tags.
    return hidden(" ".join(str(error).split()) or type(error).__name__)


@dataclass
class Write:
    """One write: a method of a run with arguments that JSON can hold, so that another process can do it."""

    what: str
    """In words, for warnings."""
    run: Any
    """A TrackedRun; its `stage` names it on the disk."""
    call: str
    given: list[Any]

    def send(self) -> None:
        """Do it."""
        getattr(self.run, self.call)(*self.given)


class Outbox:
    """Writes to MLflow in their order; those that cannot go out now wait for the next call.

    Args:
        place: the tracking URI.
        alive: asks MLflow anything.
    """

    def __init__(self, place: str, alive: Callable[[], object]) -> None:
        self.place, self._alive = hidden(place), alive
        self.queue: deque[Write] = deque()
        self.delay_s = 0.0
        self._probe = place.rstrip("/") + "/health" if place.startswith("http") else None
        self._lock = threading.RLock()
        self._down_since: float | None = None
        self._next_try, self._pause, self._bad_tries = 0.0, _PAUSE[0], 0
        self._for_the_disk = False
        self.folder: Path | None = None
        """Where what is kept of this run lies; None before it is known."""

    def put(self, write: Write) -> bool:
        """Queue a write and send what waits; True when it is sent."""
        with self._lock:
            self.queue.append(write)
            return self.drain()

    def keep(self, own: Callable[[Any], bool]) -> bool:
        """Put on the disk what still waits for runs that are `own`, or remove what lies there of before.

        Returns whether nothing that waits would be lost with this process.
        """
        if self.folder is None:
            return False
        with self._lock:
            waiting = [write for write in self.queue if own(write.run)]
        try:
            if waiting:
                self.folder.mkdir(parents=True, exist_ok=True)
                facts = [
                    {
                        "what": w.what,
                        "stage": w.run.stage,
                        "run_id": w.run.run_id,
                        "call": w.call,
                        "given": w.given,
                    }
                    for w in waiting
                ]
                write_atomic(self.folder / _WRITES, json.dumps({"place": self.place, "writes": facts}))
            elif self.folder.exists():
                forget(self.folder)
        except OSError as error:
            log.warning("%d MLflow writes could not be kept in %s: %s", len(waiting), self.folder, error)
            return False
        return True

    def keep_file(self, path: Path, opened: IO[bytes] | None = None) -> Path:
        """A copy of a file or folder that a waiting write needs and its stage may remove; itself if not.

        Args:
            opened: the file, where its path may be gone already.
        """
        if self.folder is None:
            return path
        copy = self.folder / "files" / uuid.uuid4().hex[:8] / path.name
        try:
            copy.parent.mkdir(parents=True)
            if opened:
                opened.seek(0)
                with copy.open("wb") as file:
                    shutil.copyfileobj(opened, file)
            else:
                (shutil.copytree if path.is_dir() else shutil.copyfile)(path, copy)
        except OSError as error:
            log.warning("%s could not be kept for MLflow: %s", path, error)
            return path
        return copy

    def drain(self, patience: float = 0.0) -> bool:
        """Send what waits; True when nothing is left. Waits for MLflow up to `patience` seconds."""
        deadline = time.monotonic() + patience
        with self._lock:
            while self.queue:
                if self.attempt(self.queue[0].what, self.queue[0].send, force=patience > 0):
                    self.queue.popleft()
                elif time.monotonic() >= deadline or self._for_the_disk:  # waiting makes no room on a disk
                    return False
                else:
                    time.sleep(min(1.0, self._pause, max(0.0, deadline - time.monotonic())))
            return True

    def attempt(self, what: str, send: Callable[[], None], *, force: bool = False) -> bool:
        """Try one write. True: it is done with, sent or refused for good; False: MLflow is away."""
        with self._lock:
            if time.monotonic() < self._next_try and not force:
                return False
            try:
                if self._down_since is not None:
                    self._look()
                with self.whole():
                    send()
            except Exception as error:
                if self.is_outage(error):
                    self._went_down(error)
                    return False
                log.warning("MLflow at %s refused %s: %s", self.place, what, one_line(error))
            self._bad_tries = 0
            self._came_back()
            return True

    def whole(self) -> AbstractContextManager[None]:
        """Around a call of MLflow's: no signal cuts a transaction of its database in two.

        A server ends its own; a call of one that hangs is given up at once.
        """
        return nullcontext() if self._probe else undisturbed()

    def is_outage(self, error: Exception) -> bool:
        """Whether a failure is the server's absence rather than the write's own fault."""
        from mlflow.exceptions import MlflowException
        from requests import RequestException
        from sqlalchemy.exc import OperationalError

        # Its database answers questions, and takes writes again when there is room.
        self._for_the_disk = says_disk_full(error) or says_read_only(error)
        if self._for_the_disk:
            return True
        if not isinstance(error, MlflowException | RequestException | OperationalError):
            return False
        if getattr(error, "error_code", "") in _REFUSALS:
            return False
        # By another run's writes, while reading goes on; by a server that would let the question hang, too.
        if "database is locked" in str(error) or "timed out" in str(error):
            return True
        try:
            with self.whole():
                self._alive()
        except Exception:
            return True
        # The server answers others: a passing fault, or one write that it can never take.
        self._bad_tries += 1
        return self._bad_tries < 4

    def _look(self) -> None:
        """A quick look at a server that was away: one that hangs must not hold every write."""
        import requests

        if self._probe:
            requests.get(self._probe, timeout=_PROBE_SECONDS)

    def _went_down(self, error: Exception) -> None:
        if self._down_since is None:
            self._down_since = time.monotonic()
            log.warning(
                "MLflow at %s does not answer (%s); the run goes on, metrics are kept and sent later",
                self.place,
                one_line(error)[:300],
            )
        self._next_try = time.monotonic() + self._pause
        self._pause = min(2 * self._pause, _PAUSE[1])

    def _came_back(self) -> None:
        self._next_try, self._pause = 0.0, _PAUSE[0]
        if self._down_since is not None:
            away = time.monotonic() - self._down_since
            self.delay_s, self._down_since = self.delay_s + away, None
            log.warning("MLflow at %s answers again after %.0f s; sending what waited", self.place, away)


def kept(workspace: Path) -> list[Path]:
    """The folders of runs whose writes wait on the disk."""
    return sorted(path.parent for path in (workspace / FOLDER).glob(f"*/{_WRITES}"))


def read_kept(folder: Path, place: str) -> Sequence[dict[str, Any]] | None:
    """The writes of a folder, in their order; None if damaged, or for another MLflow than `place`.

    A damaged file is put aside, with a line in the log; what the writes would upload stays beside it.
    """
    try:
        facts = json.loads((folder / _WRITES).read_bytes())
        if facts["place"] != place:
            return None
        writes = list(facts["writes"])
        for write in writes:
            if set(write) != {"what", "stage", "run_id", "call", "given"} or write["call"] not in SENDERS:
                raise ValueError("it holds no writes")
    except (OSError, ValueError, TypeError, KeyError) as error:
        log.warning("the MLflow writes kept in %s cannot be read (%s); they are not sent", folder, error)
        with suppress(OSError):
            (folder / _WRITES).rename(folder / f"{_WRITES}.damaged")
        return None
    return writes


SENDERS = {
    "send_open", "send_params", "send_tag", "send_artifact", "send_text", "send_dataset", "send_points",
    "send_curve", "send_last", "send_end", "send_description",
}  # fmt: skip
"""The methods of runs that a file may name."""


def forget(folder: Path) -> None:
    """Remove what was kept of a run, now that it is sent."""
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):  # others may lie there
        folder.parent.rmdir()
