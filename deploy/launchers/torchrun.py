"""The command line that starts the ranks of a job, on one node or several."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MODULE = "dpo_core.job"

LAUNCHED = "DPO_LAUNCHED"
"""Variable that tells a rank that a launcher started it, which forwards signals to stop."""


@dataclass(frozen=True)
class Rendezvous:
    """How the nodes of a job find each other. Their commands differ only in `host` and `address`.

    The node that hosts the rendezvous store must live as long as the job. Any other node can be replaced by a
    new one with the same values, while restarts are left.
    """

    nodes: int
    """Number of nodes."""
    endpoint: str
    """HOST:PORT of the rendezvous store, reachable from every node."""
    job: str
    """Name of the job at that endpoint; the same on every node and after a restart."""
    host: bool
    """Whether this node holds the store. Explicit, because torchrun's guess by host name can be wrong."""
    address: str
    """Address at which the other nodes reach this one."""
    interface: str | None = None
    """Network interface of that address, for gloo; by default the one that the host name resolves to."""
    restarts: int = 3
    """How often the ranks restart after one was lost; one incident may need two."""

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
        """Environment variables of torchrun and its ranks."""
        # If the store were shared, agents would remember its first address, and a new node would never join.
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
        rendezvous: how the nodes find each other; None for one node.
    """
    if processes == 1 and rendezvous is None:
        # torchrun is not needed and takes three seconds to start.
        return [sys.executable, "-u", "-m", module, "--config", str(job)]
    # A single node cannot be cut off from its store, so plain torchrun suffices. The address is explicit,
    # because a container may not resolve its host name, and torchrun would retry for ever.
    starter = "dpo_core.training.run_torchrun" if rendezvous else "torch.distributed.run"
    meeting = rendezvous.arguments() if rendezvous else ["--standalone", "--local-addr=127.0.0.1"]
    start = [sys.executable, "-m", starter, *meeting, f"--nproc-per-node={processes}"]
    return [*start, "-m", module, "--config", str(job)]


def node_command(job: Path, arguments: Sequence[str] = (), python: str = "python") -> list[str]:
    """The command line of a node that a cluster's scheduler starts.

    The scheduler restarts lost nodes, all together, so torchrun restarts nothing: the ranks meet at a fixed
    address, and the job ends with them.

    Args:
        arguments: torchrun's options, except those that it reads from `PET_*` variables.
        python: the interpreter on the node.
    """
    return [python, "-m", "dpo_core.training.run_torchrun", *arguments, "-m", MODULE, "--config", str(job)]


NODE_ENVIRONMENT = {
    LAUNCHED: "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
    "PYTHONSAFEPATH": "1",
}
"""Variables of every node. PYTHONSAFEPATH: no package in the current folder replaces an installed one."""


def environment(rendezvous: Rendezvous | None = None) -> dict[str, str]:
    """This process's environment with the variables of a job."""
    variables = dict(os.environ)
    # DeepSpeed looks for ninja on PATH even if it compiles nothing.
    variables["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{variables.get('PATH', '')}"
    variables = NODE_ENVIRONMENT | variables | {LAUNCHED: "1", "PYTHONSAFEPATH": "1"}
    return variables | (rendezvous.environment() if rendezvous else {})
