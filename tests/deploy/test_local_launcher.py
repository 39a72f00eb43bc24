"""The local launcher with real torchrun jobs: states, logs, and that nothing is left running."""

import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from deploy.launchers import Launcher, LocalLauncher, State, local
from deploy.launchers.base import LOG
from dpo_core.errors import StageFailed
from tests.support.runs.training_jobs import wait_until

# A job of one rank that does what its job file says. Ranks are told by this module's name and the job's path.
MODULE = "stand_in_trainer"
SOURCE = """
import pathlib, signal, subprocess, sys, time
job = pathlib.Path(sys.argv[2])
work = job.parent
what = job.read_text()
if what == "done":
    (work / "result.json").write_text("{}")
    sys.exit(0)
if what == "fail":
    print("a line of the log", flush=True)
    raise SystemExit("the last words of a rank")
if what == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    child = subprocess.Popen([sys.executable, "-c", deaf])
    (work / f"child-{child.pid}").touch()
if what == "fertile":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    while True:
        subprocess.Popen([sys.executable, "-c", deaf, str(work)])
        (work / "ready").touch()
        time.sleep(0.02)
if what == "polite":
    def stop(*_):
        (work / "stopped").touch()
        sys.exit(75)
    signal.signal(signal.SIGTERM, stop)
(work / "ready").touch()
while True:
    time.sleep(0.05)
"""


@pytest.fixture
def launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalLauncher]:
    """The real launcher and the real torchrun; only the module that torchrun starts stands in."""
    (tmp_path / f"{MODULE}.py").write_text(SOURCE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(local, "MODULE", MODULE)
    yield LocalLauncher()
    for process in left_over(tmp_path):
        process.kill()


def make_job(tmp_path: Path, what: str, name: str = "work") -> Path:
    work = tmp_path / name
    work.mkdir(exist_ok=True)
    (work / "job").write_text(what)
    return work / "job"


def left_over(tmp_path: Path) -> list[psutil.Process]:
    """Every live process of this test's jobs: by command line, and a rank's own child."""
    children = {int(p.name.removeprefix("child-")) for p in tmp_path.glob("*/child-*")}
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        command = " ".join(process.info["cmdline"] or [])
        alive = process.info["status"] != psutil.STATUS_ZOMBIE
        if alive and (str(tmp_path) in command or (process.pid in children and "SIG_IGN" in command)):
            found.append(process)
    return found


def ranks(tmp_path: Path) -> list[psutil.Process]:
    return [p for p in left_over(tmp_path) if "-u" in p.cmdline()]


def started(job: Path) -> bool:
    return (job.parent / "ready").exists()


def test_render_is_the_command_and_starts_nothing(tmp_path: Path) -> None:
    job = tmp_path / "a folder" / "job.json"
    assert shlex.split(LocalLauncher().render(job, 2)) == [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--local-addr=127.0.0.1",
        "--nproc-per-node=2",
        "-m",
        "dpo_core.job",
        "--config",
        str(job),
    ]
    alone = [sys.executable, "-u", "-m", "dpo_core.job", "--config", str(job)]
    assert shlex.split(LocalLauncher().render(job, 1)) == alone, "one process has nobody to meet"
    assert not list(tmp_path.iterdir())
    protocol: Launcher = LocalLauncher()
    assert protocol


def test_a_job_that_ends_well_is_done(launcher: LocalLauncher, tmp_path: Path) -> None:
    job = make_job(tmp_path, "done")
    handle = launcher.submit(job, 1, job.parent)
    assert launcher.poll(handle) is State.RUNNING
    wait_until(lambda: launcher.poll(handle) is not State.RUNNING, "the end")
    assert launcher.poll(handle) is State.DONE
    launcher.cancel(handle)  # after the end: nothing to do, and no error
    assert launcher.poll(handle) is State.DONE


def test_a_job_that_fails_shows_the_end_of_its_log(launcher: LocalLauncher, tmp_path: Path) -> None:
    job = make_job(tmp_path, "fail")
    # What an earlier job left on this folder says nothing about this one.
    for name in ("result.json", "stopped", "error.json"):
        (job.parent / name).write_text("{}")
    handle = launcher.submit(job, 2, job.parent)
    wait_until(lambda: launcher.poll(handle) is not State.RUNNING, "the end")
    assert launcher.poll(handle) is State.FAILED
    log = launcher.logs(handle, lines=1000)
    assert "a line of the log" in log
    assert "the last words of a rank" in log
    assert launcher.logs(handle, lines=2) == "\n".join(log.splitlines()[-2:])


@pytest.mark.parametrize("processes", [1, 2])
def test_a_job_whose_rank_was_killed_says_so(
    launcher: LocalLauncher, tmp_path: Path, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(tmp_path, "wait")
    (job.parent / "job.log").write_text("an earlier one: Signal 9 (SIGKILL) received\n")
    handle = launcher.submit(job, processes, job.parent)
    assert launcher.why(handle) == ""
    wait_until(lambda: started(job), "a rank")
    ranks(tmp_path)[0].kill()
    wait_until(lambda: launcher.poll(handle) is not State.RUNNING, "the end")
    assert "was killed (SIGKILL); the kernel reports no kill" in launcher.why(handle)
    kills = local._out_of_memory_kills()
    monkeypatch.setattr(local, "_out_of_memory_kills", lambda: kills + 1)
    assert launcher.why(handle).startswith("out of memory: ")


def test_a_polite_job_stops_on_purpose(launcher: LocalLauncher, tmp_path: Path) -> None:
    job = make_job(tmp_path, "polite")
    handle = launcher.submit(job, 2, job.parent)
    wait_until(lambda: started(job) and len(ranks(tmp_path)) == 2, "two ranks")
    launcher.cancel(handle, grace=20)
    assert launcher.poll(handle) is State.STOPPED
    assert not left_over(tmp_path)


def test_nothing_of_a_stubborn_job_survives_the_grace_time(launcher: LocalLauncher, tmp_path: Path) -> None:
    job = make_job(tmp_path, "stubborn")
    handle = launcher.submit(job, 2, job.parent)
    wait_until(lambda: started(job) and len(ranks(tmp_path)) == 2, "two ranks")
    assert len(left_over(tmp_path)) >= 4, "torchrun, two ranks, and a child that is deaf too"
    start = time.monotonic()
    launcher.cancel(handle, grace=0.5)
    # Left to itself torchrun would kill its ranks too, after half a minute.
    assert time.monotonic() - start < 25
    assert not left_over(tmp_path)
    assert launcher.poll(handle) is State.FAILED


@pytest.mark.usefixtures("launcher")  # for the module that torchrun starts
def test_whoever_is_in_a_hurry_does_not_wait_for_the_grace_time(tmp_path: Path) -> None:
    hurry = threading.Event()
    launcher = LocalLauncher(hurry)
    job = make_job(tmp_path, "stubborn")
    handle = launcher.submit(job, 1, job.parent)
    wait_until(lambda: started(job), "a rank")
    start = time.monotonic()
    threading.Timer(0.5, hurry.set).start()
    launcher.cancel(handle, grace=60)
    assert time.monotonic() - start < 50
    assert not left_over(tmp_path)


@pytest.mark.slow  # ranks without a torchrun are found and ended: the orphans of a killed flow, below
def test_ranks_are_told_even_if_torchrun_does_not_tell_them(launcher: LocalLauncher, tmp_path: Path) -> None:
    """As when a second signal breaks off the orderly end that a first one began."""
    job = make_job(tmp_path, "polite")
    handle = launcher.submit(job, 2, job.parent)
    wait_until(lambda: started(job), "a rank")
    psutil.Process(int(handle)).suspend()
    launcher.cancel(handle, grace=2)
    assert (job.parent / "stopped").exists()
    assert not left_over(tmp_path)


def test_children_born_while_a_job_is_ended_are_ended_too(launcher: LocalLauncher, tmp_path: Path) -> None:
    job = make_job(tmp_path, "fertile")
    handle = launcher.submit(job, 1, job.parent)
    wait_until(lambda: started(job), "a rank")
    launcher.cancel(handle, grace=0.3)
    assert not left_over(tmp_path)


def killed_flow(tmp_path: Path, *jobs: Path, **variables: str) -> psutil.Process:
    """Start jobs of two ranks from a flow that is killed when they run; the first job's torchrun."""
    flow = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time; from pathlib import Path; from deploy.launchers import local\n"
            f"local.MODULE = {MODULE!r}\n"
            f"for job in map(Path, {[str(job) for job in jobs]!r}):\n"
            "    print(local.LocalLauncher().submit(job, 2, job.parent), flush=True)\n"
            "time.sleep(600)",
        ],
        stdout=subprocess.PIPE,
        env=os.environ
        | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(__file__).resolve().parents[2]}"}
        | variables,
    )
    assert flow.stdout is not None
    torchrun = psutil.Process(int(flow.stdout.readline()))
    wait_until(lambda: all(map(started, jobs)) and len(ranks(tmp_path)) == 2 * len(jobs), "the jobs")
    flow.kill()
    flow.wait()
    return torchrun


@pytest.mark.slow  # that children end with a killed parent: tests/flows/process/test_children.py
def test_the_job_of_a_killed_flow_ends(launcher: LocalLauncher, tmp_path: Path) -> None:
    killed_flow(tmp_path, make_job(tmp_path, "wait"))
    wait_until(lambda: not left_over(tmp_path), "the end of torchrun and its ranks")


def test_the_orphans_of_a_killed_flow_are_reaped_by_the_next_submit(
    launcher: LocalLauncher, tmp_path: Path
) -> None:
    job = make_job(tmp_path, "wait")
    bystander = make_job(tmp_path, "wait", name="other")
    torchrun = killed_flow(tmp_path, job, bystander, PATH="")  # no setpriv there
    torchrun.kill()
    orphans = {p.pid for p in left_over(tmp_path) if str(job.parent) in " ".join(p.cmdline())}
    others = {p.pid for p in left_over(tmp_path) if str(bystander) in p.cmdline()}
    assert len(orphans) == 2, "torchrun gives its ranks a session of their own"

    (job.parent / "ready").unlink()
    make_job(tmp_path, "done")
    handle = launcher.submit(job, 1, job.parent)
    alive = {p.pid for p in left_over(tmp_path)}
    assert not alive & orphans
    assert others <= alive, "the job of another folder is left alone"
    wait_until(lambda: launcher.poll(handle) is not State.RUNNING, "the end")
    assert launcher.poll(handle) is State.DONE


def test_without_the_packages_of_jobs_nothing_starts_and_the_error_names_the_extra(
    launcher: LocalLauncher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(StageFailed, match="deepspeed not installed") as caught:
        launcher.submit(tmp_path / "job.json", 1, tmp_path)
    assert "pip install 'dpo-pipeline[train]'" in str(caught.value)
    assert (tmp_path / LOG).read_text() == ""
