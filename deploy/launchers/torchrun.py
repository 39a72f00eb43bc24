"""The torchrun command line of a training job, on one node or on many."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MODULE = "dpo_core.job"

LAUNCHED = "DPO_LAUNCHED"
"""Variable by which a rank knows that a launcher started it, which passes on signals to stop."""


@dataclass(frozen=True)
class Rendezvous:
    """How the nodes of one job find each other. All run one command but for `host` and `address`.

    The node that hosts the rendezvous store must live as long as the job; any other may be replaced by a new
    one with the same values while restarts are left.
    """

    nodes: int
    """Number of nodes."""
    endpoint: str
    """HOST:PORT of the rendezvous store, reachable from every node."""
    job: str
    """Name of the job at that endpoint; the same on every node and after a restart."""
    host: bool
    """Whether this node holds the store. Said outright: torchrun's guess by host name can be wrong."""
    address: str
    """Address by which the other nodes reach this one."""
    interface: str | None = None
    """Network interface of that address, for gloo; without it gloo takes what the host name resolves to."""
    restarts: int = 3
    """Times that the ranks are started again after one was lost; one incident may need two."""

    def arguments(self) -> list[str]:
        """torchrun's options."""
        return [
            f"--nnodes={self.nodes}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={self.endpoint}",
            f"--rdzv-id={self.job}",
            f"--rdzv-conf=is_host={int(self.host)}",
            f"--local-addr={self.address}",
            f"--max-restarts={self.restarts}",
        ]

    def environment(self) -> dict[str, str]:
        """Variables that torchrun and its ranks need beside."""
        # With the store shared, agents remember where the first ranks met, and a new node never gets there.
        variables = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        if self.interface:
            variables |= {"GLOO_SOCKET_IFNAME": self.interface, "NCCL_SOCKET_IFNAME": self.interface}
        return variables


def command(
    job: Path, processes: int, rendezvous: Rendezvous | None = None, module: str = MODULE
) -> list[str]:
    """The command line that starts a job's ranks on this node.

    Args:
        processes: ranks on each node.
        rendezvous: where the nodes meet; None for one node.
    """
    if processes == 1 and rendezvous is None:
        # Nobody to find: torchrun would only take its own three seconds to start.
        return [sys.executable, "-u", "-m", module, "--config", str(job)]
    # Alone, torchrun has its store at hand and cannot be cut off from it. By its address: a container may not
    # know the machine's name, and torchrun would ask for it without end.
    starter = "dpo_core.training.elastic_agent" if rendezvous else "torch.distributed.run"
    meeting = rendezvous.arguments() if rendezvous else ["--standalone", "--local-addr=127.0.0.1"]
    start = [sys.executable, "-m", starter, *meeting, f"--nproc-per-node={processes}"]
    return [*start, "-m", module, "--config", str(job)]


def node_command(job: Path, arguments: Sequence[str] = (), python: str = "python") -> list[str]:
    """The command line of a node whose place among the others its scheduler tells.

    Whoever schedules starts lost nodes again, all together, so torchrun itself restarts nothing: the ranks
    meet at a fixed address, and their end is the end of the job.

    Args:
        arguments: torchrun's options; those that it takes from `PET_*` variables may be missing.
        python: the interpreter there, which is not the one here.
    """
    return [python, "-m", "dpo_core.training.elastic_agent", *arguments, "-m", MODULE, "--config", str(job)]


NODE_ENVIRONMENT = {
    LAUNCHED: "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
    "PYTHONSAFEPATH": "1",
}
"""What every node is given. PYTHONSAFEPATH: no package in the current folder replaces an installed one."""


def environment(rendezvous: Rendezvous | None = None) -> dict[str, str]:
    """The caller's environment without what would confuse torch or DeepSpeed."""
    variables = dict(os.environ)
    # DeepSpeed looks for ninja on PATH even when nothing is built.
    variables["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{variables.get('PATH', '')}"
    variables = NODE_ENVIRONMENT | variables | {LAUNCHED: "1", "PYTHONSAFEPATH": "1"}
    return variables | (rendezvous.environment() if rendezvous else {})
