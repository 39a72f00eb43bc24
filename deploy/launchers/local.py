"""Training on this machine: torchrun as a child in the flow's own process group."""

import contextlib
import os
import shlex
import subprocess
import sys
from pathlib import Path

import psutil

from deploy.launchers.base import State

STOPPED_FILE = "stopped"


class LocalLauncher:
    """torchrun beside the flow.

    The child stays in the flow's process group: a Prefect worker that cancels a run kills that group, and a
    child in a session of its own would go on training unseen.
    """

    def __init__(self) -> None:
        self._jobs: dict[str, tuple[subprocess.Popen[bytes], Path]] = {}

    def command(self, job: Path, processes: int) -> list[str]:
        """The torchrun command line of a job."""
        return [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={processes}",
            "-m",
            "dpo_core.train",
            "--config",
            str(job),
        ]

    def render(self, job: Path, processes: int) -> str:
        return shlex.join(self.command(job, processes))

    def submit(self, job: Path, processes: int, work: Path) -> str:
        """Start torchrun, once a process that a killed flow left on this work folder is ended."""
        self._reap(work)
        with (work / "train.log").open("ab") as output:
            process = subprocess.Popen(
                self.command(job, processes), stdout=output, stderr=subprocess.STDOUT, env=_environment()
            )
        handle = str(process.pid)
        (work / "pid").write_text(f"{handle} {psutil.Process(process.pid).create_time()}")
        self._jobs[handle] = (process, work)
        return handle

    def poll(self, handle: str) -> State:
        process, work = self._jobs[handle]
        code = process.poll()
        if code is None:
            return State.RUNNING
        (work / "pid").unlink(missing_ok=True)
        if (work / "result.json").exists():
            return State.DONE
        # torchrun answers 1 whatever its ranks said; files tell a stop from a failure.
        stopped = not (work / "error.json").exists() and (work / STOPPED_FILE).exists()
        return State.STOPPED if stopped else State.FAILED

    def cancel(self, handle: str, grace: float = 25.0) -> None:
        process, _ = self._jobs[handle]
        _end_tree(process.pid, grace)
        process.wait()

    def logs(self, handle: str, lines: int = 50) -> str:
        _, work = self._jobs[handle]
        text = (work / "train.log").read_text(errors="replace")
        return "\n".join(text.splitlines()[-lines:])

    @staticmethod
    def _reap(work: Path) -> None:
        """End what a killed flow left running here: two trainers on one folder would ruin its checkpoints."""
        try:
            pid, born = (work / "pid").read_text().split()
            alive = abs(psutil.Process(int(pid)).create_time() - float(born)) < 1
        except (OSError, ValueError, psutil.NoSuchProcess):
            alive = False
        if alive:
            _end_tree(int(pid), grace=10.0)
        (work / "pid").unlink(missing_ok=True)


def _end_tree(pid: int, grace: float) -> None:
    """SIGTERM to the root, which hands it on; SIGKILL to whoever lives after the grace time."""
    try:
        root = psutil.Process(pid)
        everyone = [root, *root.children(recursive=True)]
        root.terminate()
    except psutil.NoSuchProcess:
        return
    _, alive = psutil.wait_procs(everyone, timeout=grace)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=5)


def _environment() -> dict[str, str]:
    """The flow's environment without what would confuse torch or DeepSpeed."""
    environment = dict(os.environ)
    # DeepSpeed looks for ninja on PATH even when nothing is built.
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    environment.setdefault("PYTHONUNBUFFERED", "1")
    return environment
