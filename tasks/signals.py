"""How a run that is told to stop comes to its end, and in time.

The first signal raises in the main thread: KeyboardInterrupt, `Terminated`, or Prefect's TerminationSignal.
On its way out it passes what has to be brought to an end: a job saves its state, MLflow and the record of the
run are told. None of that may be cut short: from `begin_stop` on signals raise no more, and work in other
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

from deploy.launchers import local

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


class _Stop:
    """The stop of this process."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.reason = ""
        self.timer: threading.Timer | None = None


_stop = _Stop()


def stop_reason() -> str | None:
    """Why this run is being stopped; None while it is not."""
    return _stop.reason if _stop.begun.is_set() else None


def begin_stop(error: BaseException) -> None:
    """Where the error is that of a signal: let nothing disturb the run's end any more, nor let it last.

    What comes up on the way is a consequence: a console whose reader, the worker, is gone raises SystemExit.
    """
    if _stop.begun.is_set() or not _is_stop(error):
        return
    number = int(getattr(error, "signal", None) or signal.SIGINT)
    _stop.reason = f"stopped by {signal.Signals(number).name}"
    if isinstance(error, SystemExit) and not isinstance(error, Terminated):
        _stop.reason = f"stopped by {error!r}"
    _stop.begun.set()
    _start_clock(number)
    if threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            signal.signal(number, _again)


def _start_clock(number: int) -> None:
    if _stop.timer is None:
        _stop.timer = threading.Timer(LIMIT, os._exit, [128 + number])
        _stop.timer.daemon = True
        _stop.timer.start()


def go_on() -> None:
    """Raise in a thread that works for a run which is being stopped; the main thread has its own signal."""
    if _stop.begun.is_set() and threading.current_thread() is not threading.main_thread():
        raise WorkStopped


def _again(number: int, frame: FrameType | None) -> None:
    # Who presses Ctrl-C twice does not want to wait until the step at hand is saved.
    if number == signal.SIGINT:
        local.hurry.set()


def _first(number: int, frame: FrameType | None) -> NoReturn:
    error = KeyboardInterrupt() if number == signal.SIGINT else Terminated(number)
    begin_stop(error)
    raise error


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
def stoppable() -> Iterator[None]:
    """Within it SIGINT, SIGTERM and SIGHUP stop the run of a command in good order."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    try:
        # Who ignores SIGHUP (nohup) means it.
        with _handlers(_first, lambda own: own is not signal.SIG_IGN):
            yield
    finally:
        if _stop.timer:
            _stop.timer.cancel()
            _stop.timer = None
        _stop.begun.clear()
        local.hurry.clear()


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
    stops = [number for number in _SIGNALS if signal.getsignal(number) is _first]

    def later(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if number in stops:
            _start_clock(number)

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
