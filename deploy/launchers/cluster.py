"""`ClusterConfig`, the settings of every cluster, and what the launchers of clusters share."""

import logging
import re
import shutil
import subprocess
import time
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Annotated, NamedTuple, TypeVar

from filelock import FileLock
from pydantic import AfterValidator, Field, field_validator

from deploy.launchers.base import Launcher, State, clear
from dpo_core.config import Config
from dpo_core.errors import RecipeError, StageFailed
from dpo_core.redaction import SECRET_NAME
from dpo_core.system import digest_text, write_atomic

T = TypeVar("T")

log = logging.getLogger("dpo")

AWAY = 600.0
"""Maximum seconds that a cluster may be unreachable."""


def _absolute(path: str) -> str:
    if not PurePosixPath(path).is_absolute() or path == "/":
        raise ValueError("the mount must be an absolute path other than /")
    return path


MountPath = Annotated[str, AfterValidator(_absolute)]
"""Where the workspace's storage is mounted, on the nodes and on the flow's machine."""


class ClusterConfig(Config):
    """The size of a job and the environment of its nodes."""

    nodes: int = Field(1, ge=1)
    """Number of nodes."""
    gpus: int = Field(8, ge=0)
    """GPUs per node; 0: train on CPUs."""
    cpus: int | None = Field(None, ge=1)
    """CPU cores per node; empty: the cluster's default."""
    memory_gib: int | None = Field(None, ge=1)
    """Memory per node, in GiB; empty: the cluster's default."""
    hours: float | None = Field(None, gt=0)
    """Time limit of the job, in hours."""
    environment: dict[str, str] = Field({})
    """Environment variables of every node, such as NCCL_SOCKET_IFNAME. Manifests show them: no secrets."""
    python: str = "python"
    """Python interpreter on the nodes that has this package."""

    @field_validator("environment")
    @classmethod
    def _names(cls, variables: dict[str, str]) -> dict[str, str]:
        for name in variables:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(f"{name!r} is not a valid variable name: use letters, digits and _ only")
            if SECRET_NAME.search(name):
                raise ValueError(
                    f"{name} looks like a secret, and manifests show these variables: remove it, and use the "
                    "field secrets if the cluster has one"
                )
        return variables

    def check(self, processes: int) -> None:
        """Refuse more ranks than GPUs per node, and warn of unused GPUs.

        Raises:
            RecipeError: there are more ranks than GPUs.
        """
        if self.gpus and processes > self.gpus:
            raise RecipeError(
                f"engine.processes is {processes}, but the nodes have gpus={self.gpus}",
                "Lower engine.processes, or request more GPUs per node",
            )
        if processes < self.gpus:
            log.warning(
                "each node has gpus=%d, but engine.processes=%d uses only some of them", self.gpus, processes
            )


def require_seen(folder: Path, mount: str, where: str) -> None:
    """Refuse a folder that the nodes cannot see.

    Raises:
        RecipeError: the folder is not below the mount.
    """
    if not folder.absolute().is_relative_to(mount):
        raise RecipeError(
            f"{folder.absolute()} is not {where} at {mount}",
            f"Mount it at {mount} on this machine too, and set workspace to a folder below {mount}",
        )


def require_command(name: str, remedy: str) -> None:
    """Refuse to continue if a command is not installed.

    Raises:
        RecipeError: it is not on PATH.
    """
    if shutil.which(name) is None:
        raise RecipeError(f"the command {name} is not installed on this machine", remedy)


def run_command(
    *command: str, remedy: str, timeout: float, text: str | None = None, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run a command of a cluster.

    Args:
        remedy: what to do if the command is not installed.
        timeout: seconds to wait for its answer.

    Raises:
        RecipeError: the command is not installed.
        StageFailed: it fails or does not answer.
    """
    try:
        done = subprocess.run(
            command, input=text, capture_output=True, text=True, timeout=timeout, check=False
        )
    except FileNotFoundError as error:
        raise RecipeError(f"the command {command[0]} is not installed on this machine", remedy) from error
    except subprocess.TimeoutExpired as error:
        raise StageFailed(
            f"{command[0]} has not answered for {timeout:g} s",
            "Look at the state of the cluster; then resume the run, which finds its job again",
        ) from error
    if check and done.returncode:
        output = " ".join((done.stderr or done.stdout).split())[-600:] or f"status {done.returncode}"
        raise StageFailed(
            f"{command[0]}: {output.removeprefix(f'{command[0]}: error: ')}",
            "Change the setting that it names, or try again later",
        )
    return done


def patiently(name: str, ask: Callable[[], T]) -> T:
    """Ask until the cluster answers. While it is unreachable, its jobs continue.

    Args:
        ask: raises StageFailed while there is no answer.

    Raises:
        StageFailed: it is unreachable for too long.
    """
    limit, pause = time.monotonic() + AWAY, 0.25
    while True:
        try:
            return ask()
        except StageFailed as error:
            if time.monotonic() + pause > limit:
                raise StageFailed(
                    f"{name} has not answered for {AWAY:g} s ({error.problem})",
                    f"The job may continue; resume the run when {name} is back",
                ) from error
        time.sleep(pause)
        pause = min(2 * pause, 15.0)


class Handle(NamedTuple):
    """Identifies a job of a cluster to any process; as text `ID WORK`."""

    id: str
    """The cluster's name or number of the job; contains no blank."""
    work: Path
    """Its work folder."""

    def __str__(self) -> str:
        return f"{self.id} {self.work}"

    @classmethod
    def parse(cls, text: str) -> "Handle":
        """Parse the text of a handle.

        Raises:
            StageFailed: the text is not a handle.
        """
        name, blank, work = text.partition(" ")
        if not (name and blank and work):
            raise StageFailed(f"'{text}' is not a handle of a cluster job", "Use the handle from submit")
        return cls(name, Path(work))


def job_name(run: str, attempt: int) -> str:
    """The name of one attempt at a job; the same arguments give the same name.

    It is a DNS label of at most 48 characters, because Kubernetes appends up to 15 to make host names. The
    digest distinguishes jobs whose names differ only in characters that a label cannot contain.
    """
    digest = digest_text(run)[:8]
    readable = re.sub(r"[^a-z0-9]+", "-", run.lower())[:28].strip("-")
    return f"dpo-{readable}-{digest}-{attempt}" if readable else f"dpo-{digest}-{attempt}"


class ClusterLauncher(Launcher):
    """Launches a job that continues if the flow ends. Any process of the same user can rejoin it.

    A job that failed or stopped is followed by the next attempt, under another name.

    Args:
        run: the job's name to users.
    """

    def __init__(self, config: ClusterConfig, run: str) -> None:
        self.config, self.run, self.attempt = config, run, 1

    @property
    def name(self) -> str:
        """The name of the attempt on the cluster."""
        return job_name(self.run, self.attempt)

    def require_seen(self, folder: Path) -> None:
        """Refuse a folder that the nodes cannot see, if this machine can know."""

    @abstractmethod
    def require_client(self) -> None:
        """Refuse to continue without the commands or credentials of the cluster."""

    @abstractmethod
    def find(self, work: Path) -> str | None:
        """The handle of this attempt's job; None if it does not exist."""

    def submit(self, job: Path, processes: int, work: Path) -> str:
        """Start the job, or rejoin the one that an earlier call started.

        Raises:
            RecipeError: the nodes cannot see the job, or a setting is wrong.
            StageFailed: the cluster refuses the job.
        """
        job, work = job.absolute(), work.absolute()
        for path in (job, work):
            self.require_seen(path)
        self.config.check(processes)
        # Clusters accept two jobs of one name.
        with FileLock(work / "submit.lock"):
            count = work / "attempt"
            self.attempt = int(count.read_text()) if count.exists() else 1
            existing = self.find(work)
            if existing and self.poll(existing) in {State.FAILED, State.STOPPED}:
                self.cancel(existing)
                self.attempt += 1
                existing = self.find(work)
            write_atomic(count, str(self.attempt))
            return existing or self._start_once(job, processes, work)

    def _start_once(self, job: Path, processes: int, work: Path) -> str:
        clear(work)
        try:
            handle = self.start(job, processes, work)
        except StageFailed:
            # A cluster that is too slow to answer has often accepted the job.
            handle = self.find(work)
            if handle is None:
                raise
        handle = handle or self.find(work)
        if handle is None:
            raise StageFailed(f"the job {self.name} was accepted but is not listed", "Look at the cluster")
        return handle

    @abstractmethod
    def start(self, job: Path, processes: int, work: Path) -> str | None:
        """Start a job that does not exist; returns its handle, or None if only `find` knows it."""
