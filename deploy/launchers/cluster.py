"""`ClusterConfig`, the settings of every cluster, and the checks, job names and handles of its launchers."""

import hashlib
import logging
import os
import re
import shutil
from pathlib import Path
from typing import NamedTuple

from pydantic import Field, field_validator

from dpo_core.config import Config
from dpo_core.errors import RecipeError, StageFailed
from dpo_core.redaction import SECRET_NAME
from dpo_core.system import RUN_MARK

log = logging.getLogger("dpo")


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


def command_environment() -> dict[str, str]:
    """The environment of a cluster's commands: this process's, without the mark of the run.

    What they start continues if the run is killed: jobs, which inherit the variables of sbatch, and
    SkyPilot's server, which the first command starts on this machine.
    """
    return {name: value for name, value in os.environ.items() if name != RUN_MARK}


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
    digest = hashlib.sha256(run.encode()).hexdigest()[:8]
    readable = re.sub(r"[^a-z0-9]+", "-", run.lower())[:28].strip("-")
    return f"dpo-{readable}-{digest}-{attempt}" if readable else f"dpo-{digest}-{attempt}"
