"""Signal handling: stop a run in an orderly way and in time after SIGINT, SIGTERM or SIGHUP.

The first signal raises in the main thread: KeyboardInterrupt, `Terminated`, or Prefect's TerminationSignal.
While the error propagates, the running job saves its state, and the status is written to MLflow and to the
run's record. Nothing may interrupt that: after `Stop.begin` signals raise no more, and work in other threads
ends at its next progress update. A signal must not raise inside a database transaction either: see
`signals_deferred`.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

LIMIT = 25.0
"""Seconds from the first signal to the end of the process; a temporary server may take 5 more."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Terminated(SystemExit):
    """SIGTERM or SIGHUP arrived; the exit status follows the convention of shells."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = number


class WorkStopped(BaseException):
    """Ends the work of a thread whose run is being stopped."""


def _is_stop(error: BaseException) -> bool:
    prefect = sys.modules.get("prefect.exceptions")  # if it was not imported, nothing raises its signal
    stops = (KeyboardInterrupt, SystemExit, WorkStopped)
    return isinstance(error, stops) or (prefect is not None and isinstance(error, prefect.TerminationSignal))


class Stop:
    """The stop of one run: whether it has begun, its reason, and the timer that ends a hanging process."""

    def __init__(self) -> None:
        self.no_time_to_save = threading.Event()
        """Set by a second Ctrl-C: cancelled jobs get no time to save."""
        self._begun = threading.Event()
        self._reason = ""
        self._timer: threading.Timer | None = None
        self.before_time_is_up: Callable[[], None] = lambda: None
        """Called before a process that takes too long is ended: nothing else of it runs then."""

    @property
    def reason(self) -> str | None:
        """Why the run is being stopped; None while it is not."""
        return self._reason if self._begun.is_set() else None

    def begin(self, error: BaseException) -> None:
        """If a signal raised the error, ignore further signals and start the timer.

        Later errors are consequences: a console whose reader, the worker, is gone raises SystemExit.
        """
        if self._begun.is_set() or not _is_stop(error):
            return
        number = int(getattr(error, "signal", None) or signal.SIGINT)
        self._reason = f"stopped by {signal.Signals(number).name}"
        if isinstance(error, SystemExit) and not isinstance(error, Terminated):
            self._reason = f"stopped by {error!r}"
        self._begun.set()
        self.start_timer(number)
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                signal.signal(number, self.on_later_signal)

    def check(self) -> None:
        """Raise `WorkStopped` if the run is being stopped and this is not the main thread."""
        if self._begun.is_set() and threading.current_thread() is not threading.main_thread():
            raise WorkStopped

    def start_timer(self, number: int) -> None:
        """End the process `LIMIT` seconds after its first signal, even if something hangs."""
        if self._timer is None:
            self._timer = threading.Timer(LIMIT, self._end, [128 + number])
            self._timer.daemon = True
            self._timer.start()

    def _end(self, code: int) -> None:
        try:
            self.before_time_is_up()
        finally:
            os._exit(code)

    def stop_timer(self) -> None:
        """Cancel the timer, because the command has ended in time."""
        if self._timer:
            self._timer.cancel()
            self._timer = None

    def on_first_signal(self, number: int, frame: FrameType | None) -> NoReturn:
        """Handler: begin the stop and raise in the main thread."""
        error = KeyboardInterrupt() if number == signal.SIGINT else Terminated(number)
        self.begin(error)
        raise error

    def on_later_signal(self, number: int, frame: FrameType | None) -> None:
        """Handler once the stop has begun: raises nothing."""
        # A user who presses Ctrl-C twice does not want to wait until the current step is saved.
        if number == signal.SIGINT:
            self.no_time_to_save.set()


def stop_of_process() -> Stop:
    """The `Stop` that handles this process's signals; a new one if `stoppable` handles none of them.

    It is read from the process's signal handlers, because a separate variable could disagree with them. Under
    a worker, Prefect's handler raises an error, and the new stop begins with that error.
    """
    owners = (_owner(signal.getsignal(number)) for number in _SIGNALS)
    return next((stop for stop in owners if stop), None) or Stop()


def _owner(handler: object) -> Stop | None:
    """The `Stop` whose method the handler is; None for other handlers."""
    stop = getattr(handler, "__self__", None)
    return stop if isinstance(stop, Stop) else None


@contextmanager
def _handlers(
    handler: Callable[[int, FrameType | None], object], may_replace: Callable[[object], bool]
) -> Iterator[None]:
    """Within it `handler` replaces each signal's handler for which `may_replace` is true."""
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    for number, own in before.items():
        if may_replace(own):
            signal.signal(number, handler)
    try:
        yield
    finally:
        for number, own in before.items():
            signal.signal(number, own)


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Within it SIGINT, SIGTERM and SIGHUP stop the run of a command in an orderly way."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    try:
        # Ignored signals stay ignored, such as SIGHUP under nohup.
        with _handlers(stop.on_first_signal, lambda own: own is not signal.SIG_IGN):
            yield stop
    finally:
        stop.stop_timer()


@contextmanager
def signals_deferred() -> Iterator[None]:
    """Within it no signal raises in the main thread; signals that arrive are raised at its end.

    An interrupted database write would leave its transaction open and the database locked while the error
    propagates, and the end of the run writes to the same database.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []
    stops: dict[int, Stop | None] = {number: _owner(signal.getsignal(number)) for number in _SIGNALS}

    def later(number: int, frame: FrameType | None) -> None:
        arrived.append(number)
        if stop := stops[number]:
            stop.start_timer(number)

    try:
        # Ignored signals and default handlers are left as they are.
        with _handlers(later, callable):
            yield
    finally:
        _raise_again(arrived)


def _raise_again(numbers: Sequence[int]) -> None:
    if numbers:
        try:
            signal.raise_signal(numbers[0])
        finally:
            _raise_again(numbers[1:])
