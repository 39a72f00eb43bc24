"""Prepares one rank of a job that does not train: CPU threads, device, connection to the other ranks."""

import os
from datetime import timedelta
from pathlib import Path

import torch

from dpo_core.jobs.files import ERROR, STOP_FILE, InferenceConfig
from dpo_core.ranks import JobRanks
from dpo_core.training.distributed import share_cores
from dpo_core.training.liveness import LivenessMonitor
from dpo_core.training.stop import Stopped, StopSignals


def start_ranks(work: Path, config: InferenceConfig, monitor: LivenessMonitor) -> JobRanks:
    """The ranks of this job, connected.

    Raises:
        StageFailed: rank 0 and another rank cannot reach each other.
    """
    signals = StopSignals()
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    share_cores(config.processes or 1)
    if config.threads:
        torch.set_num_threads(config.threads)
    if torch.cuda.is_available():
        # As in training, where torch 2.13's cuDNN attention gives NaN gradients in bf16.
        torch.backends.cuda.enable_cudnn_sdp(False)
        torch.cuda.set_device(device())
    if world > 1:
        # Only to connect the ranks: results are exchanged as files.
        torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=config.timeout_seconds))
        monitor.start(config.lost_after_seconds, config.timeout_seconds)
    clear_end_markers(work)

    def check() -> None:
        if signals.received or (world > 1 and (work / STOP_FILE).exists()):
            raise Stopped(signals.received)

    return JobRanks(work, rank, world, check=check)


def clear_end_markers(work: Path) -> None:
    """Remove the error and stop files of an earlier start of the job."""
    if os.environ.get("RANK", "0") == "0":
        for name in (ERROR, STOP_FILE):
            (work / name).unlink(missing_ok=True)


def device() -> torch.device:
    """The device of this rank: its own GPU, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
