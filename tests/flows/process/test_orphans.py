"""Servers of killed runs are ended; those of living runs, and other people's, are not."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from flows.process.orphans import end_orphans

SERVER = "prefect.server.api.server:create_app"


def _sleeper(owner: str | None, name: str = SERVER) -> subprocess.Popen[bytes]:
    environment = {k: v for k, v in os.environ.items() if k != "DPO_FLOW_PID"}
    if owner is not None:
        environment["DPO_FLOW_PID"] = owner
    process = subprocess.Popen(
        [sys.executable, "-c", "print(flush=True); import time; time.sleep(60)", name],
        env=environment,
        stdout=subprocess.PIPE,
    )
    assert process.stdout
    process.stdout.readline()  # the process shows its own command line and environment now
    return process


@pytest.fixture
def dead() -> str:
    """The number of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return str(process.pid)


@pytest.fixture
def others() -> Iterator[list[subprocess.Popen[bytes]]]:
    processes: list[subprocess.Popen[bytes]] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def test_only_the_server_of_a_dead_run_is_ended(dead, others):
    orphan = _sleeper(dead)
    others += [_sleeper(str(os.getpid())), _sleeper(None), _sleeper(dead, "something.else")]
    assert end_orphans() >= 1
    assert orphan.wait(timeout=120) == -9
    assert [process.poll() for process in others] == [None, None, None]
