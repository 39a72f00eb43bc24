"""Signals: the first one raises, later ones do not interrupt the end, and the process ends in time."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prefect.exceptions import TerminationSignal

from tasks.signals import Terminated, WorkStopped, signals_deferred, stop_of_process, stoppable

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture
def soon() -> Iterator[threading.Timer]:
    """SIGINT to this process."""
    timer = threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGINT])
    yield timer
    timer.cancel()


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """As in a terminal: what a shell starts in the background ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def wait(seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)]
)
def test_a_second_signal_does_not_disturb_the_end(number: signal.Signals, kind: type[BaseException]) -> None:
    cleaned = []
    with pytest.raises(kind), stoppable() as stop:  # noqa: PT012
        try:
            os.kill(os.getpid(), number)
            wait()
        finally:
            for again in (signal.SIGTERM, signal.SIGINT):
                assert not stop.no_time_to_save.is_set()
                os.kill(os.getpid(), again)
                wait(0.05)
            assert stop.no_time_to_save.is_set(), "after a Ctrl-C more, jobs get no time to save"
            cleaned.append("all of it")
    assert cleaned
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_work_in_threads_ends_with_the_run(soon: threading.Timer) -> None:
    from flows.train_policies import _in_threads

    begun, ended = [], []
    nodes: Any = [SimpleNamespace(policy=str(seed), seed=seed, needs=[]) for seed in (1, 2, 3, 4)]

    def train(node: Any, earlier: object) -> Any:
        begun.append(node.seed)
        try:
            for _ in range(3000):
                stop.check()
                time.sleep(0.01)
        except WorkStopped:
            ended.append(node.seed)
            raise

    start = time.monotonic()
    soon.start()
    with pytest.raises(KeyboardInterrupt), stoppable() as stop:
        _in_threads(nodes, train, 2, stop)
    assert time.monotonic() - start < 25
    assert sorted(begun) == sorted(ended) == [1, 2], "two were at work, and no other was begun"
    with stoppable() as later:
        assert later.reason is None, "another run of this process is not stopped"


def test_what_hangs_is_ended_when_time_is_up() -> None:
    code = (
        "import time; from tasks import signals\nsignals.LIMIT = 0.3\n"
        "with signals.stoppable() as stop:\n"
        "    stop.before_time_is_up = lambda: print('last words', flush=True)\n"
        "    try:\n        print(flush=True); time.sleep(60)\n"
        "    finally:\n        time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=REPO, stdout=subprocess.PIPE)
    assert process.stdout
    process.stdout.readline()
    process.terminate()
    assert process.wait(timeout=100) == 143
    assert process.stdout.read() == b"last words\n"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (KeyboardInterrupt(), "stopped by SIGINT"),
        (Terminated(signal.SIGHUP), "stopped by SIGHUP"),
        (TerminationSignal(signal=signal.SIGTERM), "stopped by SIGTERM"),
        (SystemExit(1), "stopped by SystemExit(1)"),
        (RuntimeError("a failure"), None),
    ],
)
def test_the_first_error_is_the_reason(error: BaseException, reason: str | None) -> None:
    with stoppable() as stop:
        stop.begin(error)
        assert stop.reason == reason
        if reason:
            stop.begin(SystemExit(1))
            assert stop.reason == reason, "what follows is a consequence"


def test_prefects_handler_gives_way_once_the_stop_has_begun() -> None:
    """Under a worker it is Prefect that turns SIGTERM into an error."""

    def prefects(number: int, frame: object) -> None:
        raise TerminationSignal(signal=number)

    before = signal.getsignal(signal.SIGTERM)
    with stoppable():
        signal.signal(signal.SIGTERM, prefects)
        with pytest.raises(TerminationSignal):  # noqa: PT012
            os.kill(os.getpid(), signal.SIGTERM)
            wait()
        stop_of_process().begin(TerminationSignal(signal=signal.SIGTERM))
        os.kill(os.getpid(), signal.SIGTERM)
        wait(0.05)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_waits_for_the_end_of_what_must_not_be_cut_in_two() -> None:
    done = []
    with pytest.raises(Terminated), stoppable() as stop:  # noqa: PT012
        with signals_deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            wait(0.05)
            os.kill(os.getpid(), signal.SIGINT)
            wait(0.05)
            done.append("the transaction")
            assert stop.reason is None
            assert stop._timer is not None, "the time to the end counts from the signal"
        done.append("what follows")
    assert done == ["the transaction"]
    assert stop._timer is None


def test_of_two_signals_that_waited_the_second_is_heard_too() -> None:
    with pytest.raises(KeyboardInterrupt), stoppable() as stop:  # noqa: PT012
        try:
            with signals_deferred():
                for _ in range(2):
                    os.kill(os.getpid(), signal.SIGINT)
                    wait(0.05)
        finally:
            assert stop.no_time_to_save.is_set()


def test_handlers_are_as_before_and_what_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals_deferred():
            os.kill(os.getpid(), signal.SIGHUP)
            wait(0.05)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_finds_the_stop_of_its_command_and_else_has_its_own() -> None:
    with stoppable() as stop:
        assert stop_of_process() is stop
        stop.begin(KeyboardInterrupt())
        assert stop_of_process() is stop, "also once it has begun"
    assert stop_of_process() is not stop
