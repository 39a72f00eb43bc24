"""A lost rank is detected at once and a slow one never, with real processes and connections."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from dpo_core.errors import StageFailed
from dpo_core.training.liveness import LivenessMonitor
from dpo_core.training.run_torchrun import _state

FORK = get_context("fork")
"""The children have torch already; all that they do is talk over sockets.

They leave by os._exit: what an earlier test has left to be done at the interpreter's end (Prefect's queues)
is of threads that a forked child does not have.
"""
LOST, WELL = 4, 0
Work = Callable[[], object]


class Ranks:
    """Processes that watch each other while each does its work."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.all: list[BaseProcess] = []

    def start(self, *work: Work, silence: float = 1.0) -> None:
        for rank, what in enumerate(work):
            arguments = (self, rank, len(work), what, silence)
            self.all.append(FORK.Process(target=_rank, args=arguments))
            self.all[-1].start()

    def codes(self, timeout: float = 120.0) -> list[int | None]:
        for process in self.all:
            process.join(timeout)
        return [process.exitcode for process in self.all]

    def message(self, rank: int) -> str:
        path = self.folder / f"lost-{rank}"
        return path.read_text() if path.exists() else ""


def _rank(ranks: Ranks, rank: int, world: int, work: Work, silence: float) -> None:
    def lost(what: str) -> None:
        (ranks.folder / f"lost-{rank}").write_text(what)
        os._exit(LOST)

    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    store = TCPStore("127.0.0.1", ranks.store.port, is_master=False)
    monitor = LivenessMonitor(lost, grace=0.2)
    monitor.connect(store, "watch", rank, world, silence, timeout=60.0)
    store.add("ready", 1)
    work()
    monitor.leave()
    os._exit(WELL)


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Ranks]:
    ranks = Ranks(tmp_path)
    yield ranks
    for process in ranks.all:
        process.kill()


def nap(seconds: float) -> Work:
    return lambda: time.sleep(seconds)


def die() -> None:
    os._exit(9)


def hold_the_interpreter() -> None:
    """One call into C that lets no other thread run, for longer than the silence that the others bear."""
    assert ctypes.PyDLL(None).sleep(2) == 0


def be_stopped() -> None:
    """No thread of this process runs for longer than the silence that the others bear."""
    code = f"import os, time; time.sleep(2.5); os.kill({os.getpid()}, {int(signal.SIGCONT)})"
    subprocess.Popen([sys.executable, "-S", "-c", code])
    os.kill(os.getpid(), signal.SIGSTOP)


def test_slow_ranks_are_not_lost_and_leave_one_by_one(ranks: Ranks) -> None:
    ranks.start(nap(1.5), hold_the_interpreter, be_stopped, nap(3.5))
    assert ranks.codes() == [WELL] * 4
    assert [ranks.message(rank) for rank in range(4)] == [""] * 4


@pytest.mark.parametrize("victim", [0, 2])
def test_a_dead_rank_ends_the_others_although_they_hang(ranks: Ranks, victim: int) -> None:
    work: list[Work] = [nap(60)] * 3
    work[victim] = die
    start = time.monotonic()
    ranks.start(*work)
    codes = ranks.codes()
    assert time.monotonic() - start < 45, "they would have slept for a minute"
    assert codes == [9 if rank == victim else LOST for rank in range(3)]
    for rank in {0, 1, 2} - {victim}:
        assert ranks.message(rank) == f"rank {victim} has ended"


def test_a_failing_rank_may_report_its_own_error(tmp_path: Path) -> None:
    """The other end dies, and then the main thread fails of that within the time that it is given."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    messages: list[str] = []
    monitor = LivenessMonitor(messages.append)
    other = FORK.Process(target=_joins_and_dies, args=[store.port])
    other.start()
    monitor.connect(store, "watch", 0, 2, silence=1.0, timeout=60.0)
    other.join()
    time.sleep(0.2)
    monitor.mute()
    monitor.close()
    assert messages == []


def _joins_and_dies(port: int) -> None:
    monitor = LivenessMonitor(lambda _: None)
    monitor.connect(TCPStore("127.0.0.1", port, is_master=False), "watch", 1, 2, silence=1.0, timeout=60.0)
    os._exit(0)


def test_foreign_connections_are_refused_and_missing_ranks_are_counted() -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    stranger = FORK.Process(target=_stranger, args=[store.port])
    stranger.start()
    with pytest.raises(StageFailed, match="1 of 1 ranks did not connect to rank 0: 1"):
        LivenessMonitor(lambda _: None).connect(store, "watch", 0, 2, silence=1.0, timeout=1.0)
    stranger.join()
    assert stranger.exitcode == 0


def _stranger(port: int) -> None:
    watched, _ = TCPStore("127.0.0.1", port, is_master=False).get("watch").decode().split()
    with socket.create_connection(("127.0.0.1", int(watched)), timeout=60) as guess:
        guess.sendall(b"0" * 32 + b"       1")
        os._exit(WELL if guess.recv(1) == b"" else 1)


def test_an_unreachable_rank_0_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    store.set("watch", f"{port} {'0' * 32}")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(StageFailed, match=f"rank 1 cannot reach rank 0 at 127.0.0.1 port {port}"):
        LivenessMonitor(lambda _: None).connect(store, "watch", 1, 2, silence=1.0, timeout=1.0)


def test_the_agent_distinguishes_uncollected_children() -> None:
    child = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
    assert _state(child.pid) == "alive"
    assert child.stdin
    child.stdin.close()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert _state(child.pid) == "uncollected"
    child.wait()
    assert _state(child.pid) == "gone"
