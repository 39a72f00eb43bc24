"""What the launchers of all clusters share: sizes, names that survive a lost watcher, handles."""

import hashlib
import logging
import re
import shutil
from pathlib import Path
from typing import NamedTuple

from pydantic import Field, field_validator

from dpo_core.config import Config
from dpo_core.errors import RecipeError, StageFailed
from dpo_core.redaction import SECRET_NAME

log = logging.getLogger("dpo")


class ClusterConfig(Config):
    """The size of a job, and what its nodes are given."""

    nodes: int = Field(1, ge=1)
    """Nodes."""
    gpus: int = Field(8, ge=0)
    """GPUs on each node; 0 trains on its CPUs."""
    cpus: int | None = Field(None, ge=1)
    """CPU cores on each node; what the cluster gives when empty."""
    memory_gib: int | None = Field(None, ge=1)
    """Memory on each node; what the cluster gives when empty."""
    hours: float | None = Field(None, gt=0)
    """The longest that the job may run."""
    environment: dict[str, str] = Field({})
    """Variables of every node, such as NCCL_SOCKET_IFNAME. They are shown in manifests: never secrets."""
    python: str = "python"
    """The interpreter on the nodes that has this package."""

    @field_validator("environment")
    @classmethod
    def _names(cls, variables: dict[str, str]) -> dict[str, str]:
        for name in variables:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(f"{name!r} is no name of a variable: letters, digits and _ alone")
            if SECRET_NAME.search(name):
                raise ValueError(f"{name} looks like a secret, and these variables are shown in manifests")
        return variables

    def check(self, processes: int) -> None:
        """Refuse more ranks than GPUs on a node, and tell of GPUs that would stand idle.

        Raises:
            RecipeError: there are more.
        """
        if self.gpus and processes > self.gpus:
            raise RecipeError(
                f"engine.processes is {processes}, but the nodes have gpus={self.gpus}",
                "Lower engine.processes or ask for more GPUs a node",
            )
        if processes < self.gpus:
            log.warning(
                "each node has gpus=%d, and engine.processes=%d uses no more of them", self.gpus, processes
            )


def require_seen(folder: Path, mount: str, where: str) -> None:
    """Refuse a folder that the nodes would not see.

    Raises:
        RecipeError: it does not lie below the mount.
    """
    if not folder.absolute().is_relative_to(mount):
        raise RecipeError(
            f"{folder.absolute()} is not {where} at {mount}",
            "Mount it at the same place here and put the workspace there",
        )


def require_command(name: str, remedy: str) -> None:
    """Refuse to go on without a command.

    Raises:
        RecipeError: this machine does not have it.
    """
    if shutil.which(name) is None:
        raise RecipeError(f"there is no command {name} on this machine", remedy)


class Handle(NamedTuple):
    """A job as any process with the same settings finds it again; as text `ID WORK`."""

    id: str
    """How the cluster calls it; without a blank."""
    work: Path
    """Its work folder."""

    def __str__(self) -> str:
        return f"{self.id} {self.work}"

    @classmethod
    def parse(cls, text: str) -> "Handle":
        """Read a handle back.

        Raises:
            StageFailed: it is none.
        """
        name, blank, work = text.partition(" ")
        if not (name and blank and work):
            raise StageFailed(f"'{text}' is no handle of a cluster job", "Take what submit returned")
        return cls(name, Path(work))


def job_name(run: str, attempt: int) -> str:
    """The name of one attempt at a run, the same whenever it is asked for.

    It is a DNS label of at most 48 characters: Kubernetes makes host names of it by adding up to 15. The
    digest keeps apart runs whose names differ only in what a label cannot hold.
    """
    digest = hashlib.sha256(run.encode()).hexdigest()[:8]
    readable = re.sub(r"[^a-z0-9]+", "-", run.lower())[:28].strip("-")
    return f"dpo-{readable}-{digest}-{attempt}" if readable else f"dpo-{digest}-{attempt}"
