"""How a run that is told to stop comes to its end, and in time.

The first signal raises in the main thread: KeyboardInterrupt, `Terminated`, or Prefect's TerminationSignal.
On its way out it passes what has to be brought to an end: a job saves its state, MLflow and the record of the
run are told. None of that may be cut short: from `Stop.begin` on signals raise no more, and work in other
threads ends at its next sign of progress. Nor may a signal raise in the middle of a database's transaction:
see `undisturbed`.
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
"""Seconds from the signal to the end, whatever hangs; a temporary server may take 5 more."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Terminated(SystemExit):
    """SIGTERM or SIGHUP came; the exit status is the one that shells know."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = number


class WorkStopped(BaseException):
    """The run is being stopped, and this thread's work with it."""


def _is_stop(error: BaseException) -> bool:
    prefect = sys.modules.get("prefect.exceptions")  # not imported for this: nobody else raises its signal
    stops = (KeyboardInterrupt, SystemExit, WorkStopped)
    return isinstance(error, stops) or (prefect is not None and isinstance(error, prefect.TerminationSignal))


class Stop:
    """The stop of one run: whether it has begun, why, and the clock that ends what hangs."""

    def __init__(self) -> None:
        self.hurry = threading.Event()
        """Set by a second Ctrl-C: jobs that are cancelled get no time to save."""
        self._begun = threading.Event()
        self._reason = ""
        self._timer: threading.Timer | None = None

    @property
    def reason(self) -> str | None:
        """Why the run is being stopped; None while it is not."""
        return self._reason if self._begun.is_set() else None

    def begin(self, error: BaseException) -> None:
        """If the error is that of a signal, let nothing disturb the run's end any more, nor let it last.

        Later errors are consequences: a console whose reader, the worker, is gone raises SystemExit.
        """
        if self._begun.is_set() or not _is_stop(error):
            return
        number = int(getattr(error, "signal", None) or signal.SIGINT)
        self._reason = f"stopped by {signal.Signals(number).name}"
        if isinstance(error, SystemExit) and not isinstance(error, Terminated):
            self._reason = f"stopped by {error!r}"
        self._begun.set()
        self.start_clock(number)
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                signal.signal(number, self.on_later_signal)

    def check(self) -> None:
        """Raise `WorkStopped` in a thread of a run that is being stopped; the main thread has its signal."""
        if self._begun.is_set() and threading.current_thread() is not threading.main_thread():
            raise WorkStopped

    def start_clock(self, number: int) -> None:
        """End the process `LIMIT` seconds after its first signal, whatever hangs."""
        if self._timer is None:
            self._timer = threading.Timer(LIMIT, os._exit, [128 + number])
            self._timer.daemon = True
            self._timer.start()

    def stop_clock(self) -> None:
        """The command has ended in time."""
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
        # Who presses Ctrl-C twice does not want to wait until the step at hand is saved.
        if number == signal.SIGINT:
            self.hurry.set()


def stop_of_process() -> Stop:
    """The stop that signals to this process begin; a new one where `stoppable` handles none of them.

    The process's table of handlers, which Python keeps, says whose they are: a variable beside it could
    disagree. Under a worker, Prefect's handler raises an error, and the new stop begins with that.
    """
    owners = (_owner(signal.getsignal(number)) for number in _SIGNALS)
    return next((stop for stop in owners if stop), None) or Stop()


def _owner(handler: object) -> Stop | None:
    """The stop that a handler belongs to, None where it is of somebody else."""
    stop = getattr(handler, "__self__", None)
    return stop if isinstance(stop, Stop) else None


@contextmanager
def _handlers(
    handler: Callable[[int, FrameType | None], object], instead: Callable[[object], bool]
) -> Iterator[None]:
    """Within it `handler` hears the signals whose own handler is one that it may stand `instead` of."""
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    for number, own in before.items():
        if instead(own):
            signal.signal(number, handler)
    try:
        yield
    finally:
        for number, own in before.items():
            signal.signal(number, own)


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Within it SIGINT, SIGTERM and SIGHUP stop the run of a command in good order."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    try:
        # Who ignores SIGHUP (nohup) means it.
        with _handlers(stop.on_first_signal, lambda own: own is not signal.SIG_IGN):
            yield stop
    finally:
        stop.stop_clock()


@contextmanager
def undisturbed() -> Iterator[None]:
    """Within it no signal raises in the main thread; one that comes does so at its end.

    A write to a database that is interrupted half way leaves its transaction open, and the database locked,
    for as long as the error lives: all through the run's end, which writes there too.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    stops: dict[int, Stop | None] = {number: _owner(signal.getsignal(number)) for number in _SIGNALS}

    def later(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if stop := stops[number]:
            stop.start_clock(number)

    try:
        # What is ignored stays so, and what ends the process at once may.
        with _handlers(later, callable):
            yield
    finally:
        _raise_again(came)


def _raise_again(numbers: Sequence[int]) -> None:
    if numbers:
        try:
            signal.raise_signal(numbers[0])
        finally:
            _raise_again(numbers[1:])
