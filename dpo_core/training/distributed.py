"""The process group of a job: joining it, its time limits, its peak memory, and errors of lost ranks."""

import contextlib
import logging
import os
import re
import resource
import sys
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dpo_core.errors import RankLost, StageFailed
from dpo_core.models.accelerator import set_accelerator

if TYPE_CHECKING:
    from dpo_core.training.config import EngineConfig


def start_distributed(config: "EngineConfig") -> None:
    """Join the process group of torchrun's environment variables; without them, a group of one rank."""
    set_accelerator()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed  # noqa: PLC0415 - after set_accelerator

    # torch 2.13's cuDNN attention gives NaN gradients in bf16.
    if torch.cuda.is_available():
        torch.backends.cuda.enable_cudnn_sdp(False)
    # Only inference uses it, and building it needs a C++ compiler and half a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        os.environ.setdefault(name, value)
    if os.environ["WORLD_SIZE"] == "1" and "MASTER_ADDR" not in os.environ:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    share_cores(config.processes)
    if config.threads:
        torch.set_num_threads(config.threads)
    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)


def share_cores(processes: int) -> None:
    """Limit this process to its share of the cores.

    Threads spin while they wait for each other: two processes with as many threads as cores are much slower
    than one after the other.
    """
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))


def limit_waiting(seconds: float) -> None:
    """Set the timeout of the collectives of every process group.

    Each group has its own timeout, and DeepSpeed creates groups without the one of `init_distributed`.
    """
    groups = torch.distributed.distributed_c10d
    for group in list(groups._world.pg_map):
        groups._set_pg_timeout(timedelta(seconds=seconds), group)


def peak_bytes() -> int:
    """Peak memory of this process so far: allocated on its GPU, or resident without a GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError):
        # The peak of `getrusage` includes the size of the parent process before exec.
        peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        if peak:
            return int(peak[1]) * 1024
    # Linux counts the resident set in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_memory() -> int:
    """Peak memory of the job so far: summed over ranks on CPUs, which may share a machine; else the fullest
    GPU's."""
    on_gpu = torch.cuda.is_available()
    peak = torch.tensor(peak_bytes(), device="cuda" if on_gpu else "cpu")
    reduce = torch.distributed.ReduceOp
    torch.distributed.all_reduce(peak, reduce.MAX if on_gpu else reduce.SUM)
    return int(peak)


# Messages of gloo, NCCL and the rendezvous store when a peer has died or does not answer.
_LOST = re.compile(
    r"connection closed by peer|connection reset by peer|broken pipe|timed out waiting|connectfullmesh"
    r"|socket timeout|connection refused|no route to host|network is unreachable|wait timeout after"
    r"|watchdog|remote process exited|failed to recv, got 0 bytes|unbound buffer",
    re.IGNORECASE,
)


def lost_peer(error: BaseException) -> RankLost | None:
    """A `RankLost` for an error of torch or of a socket that means a lost peer; None for other errors."""
    if isinstance(error, StageFailed) or not isinstance(error, RuntimeError | OSError):
        return None
    if not _LOST.search(str(error)):
        return None
    return lost_rank("gone, cut off, or too slow for engine.timeout_seconds", str(error))


def lost_rank(how: str, detail: str) -> RankLost:
    """The error of a rank that has lost another."""
    first = detail.strip().splitlines()[0][:200]
    return RankLost(
        f"rank {os.environ.get('RANK', '0')} lost another rank: a process or node is {how} ({first})",
        "See the logs of the other nodes, then resume the run: it continues from its last checkpoint",
    )
