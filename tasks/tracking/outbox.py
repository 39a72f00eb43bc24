"""Retry queue for MLflow writes; survives outages and process restarts, and never blocks a stage for long.

While MLflow does not answer, writes are queued in order and the caller continues. Writes that are still
queued when a stage or the run ends are saved to disk, and the next run of the workspace sends them:

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

import requests
from mlflow.exceptions import MlflowException
from requests import RequestException
from sqlalchemy.exc import OperationalError

from dpo_core.redaction import redact
from dpo_core.system import write_atomic
from tasks.signals import signals_deferred
from tasks.store.files import says_disk_full, says_read_only

log = logging.getLogger(__name__)

PATIENCE = {"FINISHED": 30.0, "FAILED": 30.0, "KILLED": 5.0}  # seconds to wait for MLflow when a run ends
STAGE_PATIENCE = 5.0  # seconds to wait when a stage ends; unsent writes are on disk
FOLDER = "tracking_outbox"
_WRITES = "writes.json"
_PAUSE = (0.5, 15.0)  # first and longest pause between two attempts, seconds
_PROBE_SECONDS = 2.0
_REFUSALS = {
    "INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS", "INVALID_STATE",
    "BAD_REQUEST", "PERMISSION_DENIED", "UNAUTHENTICATED", "ENDPOINT_NOT_FOUND", "NOT_IMPLEMENTED",
}  # fmt: skip


def one_line(error: BaseException) -> str:
    """An error's message on one line, with secrets redacted, for logs and tags."""
    return redact(" ".join(str(error).split()) or type(error).__name__)


@dataclass
class Write:
    """One write: the name of a run's method and its arguments, which are JSON so that they can be saved."""

    what: str
    """What is written, for warnings."""
    run: Any
    """A TrackedRun; its `stage` identifies it on disk."""
    call: str
    args: list[Any]

    def send(self) -> None:
        """Call the method."""
        getattr(self.run, self.call)(*self.args)


class Outbox:
    """A first-in, first-out queue of MLflow writes. Writes that cannot be sent stay queued for the next call.

    Args:
        place: the tracking URI.
        alive: any request to MLflow; raises if MLflow does not answer.
    """

    def __init__(self, place: str, alive: Callable[[], object]) -> None:
        self.place, self._alive = redact(place), alive
        self.queue: deque[Write] = deque()
        self.delay_s = 0.0
        self._probe = place.rstrip("/") + "/health" if place.startswith("http") else None
        self._lock = threading.RLock()
        self._down_since: float | None = None
        self._next_try, self._pause, self._bad_tries = 0.0, _PAUSE[0], 0
        self._disk_fault = False
        self.folder: Path | None = None
        """Folder for the unsent writes of this run; None until the run's id is known."""

    def put(self, write: Write) -> bool:
        """Queue a write and try to send the queue; True if the queue is empty afterwards."""
        with self._lock:
            self.queue.append(write)
            return self.drain()

    def save(self, own: Callable[[Any], bool]) -> bool:
        """Save the queued writes of the runs selected by `own`; without any, remove earlier saved ones.

        Returns True if no queued write would be lost when this process ends.
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
                        "given": w.args,
                    }
                    for w in waiting
                ]
                write_atomic(self.folder / _WRITES, json.dumps({"place": self.place, "writes": facts}))
            elif self.folder.exists():
                remove_saved(self.folder)
        except OSError as error:
            log.warning("%d MLflow writes could not be saved in %s: %s", len(waiting), self.folder, error)
            return False
        return True

    def keep_file(self, path: Path, opened: IO[bytes] | None = None) -> Path:
        """Copy a file or folder that a queued write needs and its stage may remove; returns the copy's path,
        or `path` if it could not be copied.

        Args:
            opened: the open file, if its path may no longer exist.
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
            log.warning("%s could not be copied for MLflow: %s", path, error)
            return path
        return copy

    def drain(self, patience: float = 0.0) -> bool:
        """Send the queued writes; True if all were sent. Waits for MLflow up to `patience` seconds."""
        deadline = time.monotonic() + patience
        with self._lock:
            while self.queue:
                if self.attempt(self.queue[0].what, self.queue[0].send, force=patience > 0):
                    self.queue.popleft()
                elif time.monotonic() >= deadline or self._disk_fault:  # waiting does not free disk space
                    return False
                else:
                    time.sleep(min(1.0, self._pause, max(0.0, deadline - time.monotonic())))
            return True

    def attempt(self, what: str, send: Callable[[], None], *, force: bool = False) -> bool:
        """Try one write. True: it was sent, or MLflow rejected it for good. False: MLflow is unreachable."""
        with self._lock:
            if time.monotonic() < self._next_try and not force:
                return False
            try:
                if self._down_since is not None:
                    self._probe_server()
                with self.protected():
                    send()
            except Exception as error:
                if self.is_outage(error):
                    self._went_down(error)
                    return False
                log.warning("MLflow at %s refused %s: %s", self.place, what, one_line(error))
            self._bad_tries = 0
            self._came_back()
            return True

    def protected(self) -> AbstractContextManager[None]:
        """Context for a call that writes to MLflow's database directly: signals wait until it has finished.

        Calls to a server are not protected: the server completes its own transactions, and a call that hangs
        must remain interruptible.
        """
        return nullcontext() if self._probe else signals_deferred()

    def is_outage(self, error: Exception) -> bool:
        """Whether an error means that MLflow is unreachable, rather than that the write itself is invalid."""
        # The database still answers reads, and accepts writes again when there is space.
        self._disk_fault = says_disk_full(error) or says_read_only(error)
        if self._disk_fault:
            return True
        if not isinstance(error, MlflowException | RequestException | OperationalError):
            return False
        if getattr(error, "error_code", "") in _REFUSALS:
            return False
        # Another run's writes lock the database although reads succeed; or the probe would time out as well.
        if "database is locked" in str(error) or "timed out" in str(error):
            return True
        try:
            with self.protected():
                self._alive()
        except Exception:
            return True
        # The server answers other requests: a transient fault, or a write that it will never accept.
        self._bad_tries += 1
        return self._bad_tries < 4

    def _probe_server(self) -> None:
        """Probe a server that was down. The timeout is short: a hanging server must not block writes."""
        if self._probe:
            requests.get(self._probe, timeout=_PROBE_SECONDS)

    def _went_down(self, error: Exception) -> None:
        if self._down_since is None:
            self._down_since = time.monotonic()
            log.warning(
                "MLflow at %s does not answer (%s); the run continues, metrics are saved and sent later",
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
            log.warning(
                "MLflow at %s answers again after %.0f s; sending the queued writes", self.place, away
            )


def saved_folders(workspace: Path) -> list[Path]:
    """The folders of runs that have unsent writes on disk."""
    return sorted(path.parent for path in (workspace / FOLDER).glob(f"*/{_WRITES}"))


def read_saved(folder: Path, place: str) -> Sequence[dict[str, Any]] | None:
    """The saved writes of a folder, in order; None if the file is damaged or `place` is not their MLflow.

    A damaged file is renamed and logged; the files that its writes would upload stay in the folder.
    """
    try:
        facts = json.loads((folder / _WRITES).read_bytes())
        if facts["place"] != place:
            return None
        writes = list(facts["writes"])
        for write in writes:
            if set(write) != {"what", "stage", "run_id", "call", "given"} or write["call"] not in SENDERS:
                raise ValueError("an entry is not a write")
    except (OSError, ValueError, TypeError, KeyError) as error:
        log.warning("the MLflow writes saved in %s cannot be read (%s) and are not sent", folder, error)
        with suppress(OSError):
            (folder / _WRITES).rename(folder / f"{_WRITES}.damaged")
        return None
    return writes


SENDERS = {
    "send_open", "send_params", "send_tag", "send_artifact", "send_text", "send_dataset", "send_points",
    "send_curve", "send_last", "send_end", "send_description",
}  # fmt: skip
"""The methods that a saved write may call."""


def remove_saved(folder: Path) -> None:
    """Remove a run's saved writes after they were sent."""
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):  # other runs may have unsent writes
        folder.parent.rmdir()
