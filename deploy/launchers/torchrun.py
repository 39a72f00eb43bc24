"""The command lines that start the ranks of a job, on this machine or on the nodes of a cluster."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

MODULE = "dpo_core.job"

LAUNCHED = "DPO_LAUNCHED"
"""Variable that tells a rank that a launcher started it, which forwards signals to stop."""


def command(job: Path, processes: int, module: str = MODULE) -> list[str]:
    """The command line that starts a job's ranks on this machine."""
    if processes == 1:
        # torchrun is not needed and takes three seconds to start.
        return [sys.executable, "-u", "-m", module, "--config", str(job)]
    # The address is explicit, because a container may not resolve its host name, and torchrun would retry for
    # ever.
    meeting = ["--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={processes}"]
    return [sys.executable, "-m", "torch.distributed.run", *meeting, "-m", module, "--config", str(job)]


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


def environment() -> dict[str, str]:
    """This process's environment with the variables of a job."""
    variables = dict(os.environ)
    # DeepSpeed looks for ninja on PATH even if it compiles nothing.
    variables["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{variables.get('PATH', '')}"
    return NODE_ENVIRONMENT | variables | {LAUNCHED: "1", "PYTHONSAFEPATH": "1"}
