"""The outbox of MLflow writes: none is lost to a server's nap, and none holds up a stage.

While MLflow does not answer, writes wait in their order and the caller goes on.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from dpo_core.secrecy import hidden

log = logging.getLogger(__name__)

PATIENCE = {"FINISHED": 30.0, "FAILED": 30.0, "KILLED": 5.0}  # seconds to wait for MLflow when a run ends
_PAUSE = (0.5, 15.0)  # first and longest pause between two attempts, seconds
_REFUSALS = {
    "INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS", "INVALID_STATE",
    "BAD_REQUEST", "PERMISSION_DENIED", "UNAUTHENTICATED", "ENDPOINT_NOT_FOUND", "NOT_IMPLEMENTED",
}  # fmt: skip


def one_line(error: BaseException) -> str:
    # Without passwords of a database, in logs and tags.
    return hidden(" ".join(str(error).split()) or type(error).__name__)


class Outbox:
    """Writes to MLflow in their order; those that cannot go out now wait for the next call."""

    def __init__(self, place: str, alive: Callable[[], object]) -> None:
        self.place, self._alive = hidden(place), alive
        self.queue: deque[tuple[str, Callable[[], None]]] = deque()
        self.delay_s = 0.0
        self._lock = threading.RLock()
        self._down_since: float | None = None
        self._next_try, self._pause, self._bad_tries = 0.0, _PAUSE[0], 0

    def put(self, what: str, send: Callable[[], None]) -> None:
        with self._lock:
            self.queue.append((what, send))
            self.drain()

    def drain(self, patience: float = 0.0) -> bool:
        """Send what waits; True when nothing is left. Waits for MLflow up to `patience` seconds."""
        deadline = time.monotonic() + patience
        with self._lock:
            while self.queue:
                if self.attempt(*self.queue[0], force=patience > 0):
                    self.queue.popleft()
                elif time.monotonic() >= deadline:
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
                send()
            except Exception as error:
                if self.is_outage(error):
                    self._went_down(error)
                    return False
                log.warning("MLflow at %s refused %s: %s", self.place, what, one_line(error))
            self._bad_tries = 0
            self._came_back()
            return True

    def is_outage(self, error: Exception) -> bool:
        """Whether a failure is the server's absence rather than the write's own fault."""
        from mlflow.exceptions import MlflowException
        from requests import RequestException
        from sqlalchemy.exc import OperationalError

        if not isinstance(error, MlflowException | RequestException | OperationalError):
            return False
        if getattr(error, "error_code", "") in _REFUSALS:
            return False
        try:
            self._alive()
        except Exception:
            return True
        # The server answers others: a passing fault, or one write that it can never take.
        self._bad_tries += 1
        return self._bad_tries < 4

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
            log.info("MLflow at %s answers again after %.0f s; sending what waited", self.place, away)
