"""Jobs of one process on this machine are forked from a warm process; each is still a process of its own.

That a run starts such a process is tested with whole runs.
"""

import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from deploy.launchers import LocalLauncher, State
from deploy.launchers.job_server_client import PID_FILE, JobServer
from dpo_core.jobs.files import CompareTokensJob, write_job
from tests.support.models.tiny import make_tiny_model
from tests.support.runs.training_jobs import wait_until

pytestmark = pytest.mark.skipif(not JobServer.serves(1), reason="a process that has seen a GPU is not forked")


@pytest.fixture(scope="module")
def server() -> Iterator[JobServer]:
    server = JobServer()
    yield server
    server.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def job_file(work: Path, model: Path, other: Path | None = None) -> Path:
    return write_job(CompareTokensJob(work=str(work), model=str(model), other=str(other or model)))


def end_of(launcher: LocalLauncher, job: Path) -> State:
    handle = launcher.submit(job, 1, job.parent)
    wait_until(lambda: launcher.poll(handle) is not State.RUNNING, "the end")
    return launcher.poll(handle)


def test_jobs_are_forked_from_one_process(server: JobServer, model: Path, tmp_path: Path) -> None:
    launcher = LocalLauncher(server=server)
    for name in ("first", "second"):
        assert end_of(launcher, job_file(tmp_path / name, model)) is State.DONE
        assert (tmp_path / name / "result.json").read_text() == '{\n "differing": []\n}'
    pids = {(tmp_path / name / PID_FILE).read_text() for name in ("first", "second")}
    assert len(pids) == 2


def test_the_error_of_a_forked_job_is_kept(server: JobServer, model: Path, tmp_path: Path) -> None:
    launcher = LocalLauncher(server=server)
    job = job_file(tmp_path / "work", model, tmp_path / "nothing")
    assert end_of(launcher, job) is State.FAILED
    assert "cannot be loaded" in (job.parent / "error.json").read_text()
    assert "Traceback" in (job.parent / "job.log").read_text()


def waiting_job(work: Path, model: Path) -> Path:
    """A job that waits for a tokenizer file that nobody writes."""
    other = shutil.copytree(model, work / "other")
    (other / "tokenizer.json").unlink()
    os.mkfifo(other / "tokenizer.json")
    return job_file(work, model, other)


def test_a_killed_job_is_told_from_a_failed_one(server: JobServer, model: Path, tmp_path: Path) -> None:
    launcher = LocalLauncher(server=server)
    job = waiting_job(tmp_path, model)
    handle = launcher.submit(job, 1, job.parent)
    os.kill(int(handle), signal.SIGKILL)
    wait_until(lambda: launcher.poll(handle) is not State.RUNNING, "the end")
    assert launcher.poll(handle) is State.FAILED
    assert "SIGKILL" in launcher.why(handle)
    assert end_of(launcher, job_file(tmp_path / "next", model)) is State.DONE


def test_a_cancelled_job_is_gone_as_soon_as_it_ends(server: JobServer, model: Path, tmp_path: Path) -> None:
    """Its server, not this process, collects its status: until then it is a zombie."""
    launcher = LocalLauncher(server=server)
    job = waiting_job(tmp_path, model)
    handle = launcher.submit(job, 1, job.parent)
    began = time.monotonic()
    launcher.cancel(handle)
    assert launcher.poll(handle) is not State.RUNNING
    assert time.monotonic() - began < 10, "the time that it has to save is twice that"


def test_a_cancelled_job_and_one_that_a_killed_flow_left_are_ended(
    server: JobServer, model: Path, tmp_path: Path
) -> None:
    job = waiting_job(tmp_path, model)
    hurry = threading.Event()
    hurry.set()
    first = LocalLauncher(hurry, server)
    process = psutil.Process(int(first.submit(job, 1, job.parent)))
    # Another flow, which has no handle of the process, only the folder.
    second = LocalLauncher(hurry)
    handle = second.submit(job, 1, job.parent)
    assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    second.cancel(handle, grace=0.1)
    assert second.poll(handle) is not State.RUNNING


def test_jobs_end_with_their_server(model: Path, tmp_path: Path) -> None:
    server = JobServer()
    launcher = LocalLauncher(server=server)
    job = waiting_job(tmp_path, model)
    handle = launcher.submit(job, 1, job.parent)
    process = psutil.Process(int(handle))
    parent = process.parent()
    assert parent is not None
    parent.kill()
    wait_until(lambda: launcher.poll(handle) is not State.RUNNING, "the end")
    wait_until(lambda: not process.is_running(), "the end of the job")
    assert launcher.poll(handle) is State.FAILED
    # The next job finds a new server.
    assert end_of(launcher, job_file(tmp_path / "next", model)) is State.DONE
    server.close()
