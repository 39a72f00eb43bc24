"""The DeepSpeed engine behind one small class: build, step, checkpoint, resume, export.

One process on a laptop and many nodes run the same code; torchrun starts it everywhere.
"""

import json
import logging
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from dpo_core.checkpoints import Checkpoints, Made, load_random_state, save_random_state
from dpo_core.config import Config
from dpo_core.errors import StageFailed

log = logging.getLogger(__name__)
Found = TypeVar("Found")


class OptimConfig(Config):
    """AdamW and its schedule."""

    learning_rate: float = Field(1e-6, gt=0, le=1)
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """What follows the warm-up: stay, or fall to zero at the last step."""
    warmup_fraction: float = Field(0.1, ge=0, lt=1)
    """Share of the steps over which the learning rate rises from zero."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of AdamW's two moments."""
    epsilon: float = Field(1e-8, gt=0)
    """AdamW's epsilon."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Clip the global gradient norm here; 0 never clips."""


class EngineConfig(Config):
    """How the arithmetic is done and how often it is saved."""

    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16: autocast over fp32 weights and an fp32 head. fp32: everything in fp32."""
    zero_stage: int = Field(0, ge=0, le=3)
    """DeepSpeed ZeRO stage. 0 replicates everything and is the fastest in one process."""
    processes: int = Field(1, ge=1)
    """Ranks on each node."""
    threads: int | None = Field(None, ge=1)
    """CPU threads a rank; all cores shared out when empty."""
    gradient_checkpointing: bool = False
    """Recompute the layers in the backward pass: less memory, about a third more time."""
    save_every: int = Field(10, ge=1)
    """Steps between checkpoints."""
    keep_checkpoints: int = Field(2, ge=1)
    """Newest checkpoints that stay on the disk; with one, a damaged checkpoint ends the run."""


class Stopped(Exception):
    """SIGTERM came: the state is saved and the process may end."""


class Engine:
    """A module under DeepSpeed, with its optimiser, schedule, checkpoints and stop flag.

    Args:
        module: what is trained; its parameters that require gradients are.
        micro_batches: backward calls before each optimiser step, on every rank.
        work: folder of this job; checkpoints lie in `work/checkpoints`.
    """

    def __init__(
        self,
        module: nn.Module,
        optim: OptimConfig,
        config: EngineConfig,
        *,
        total_steps: int,
        micro_batches: int,
        work: Path,
    ) -> None:
        import deepspeed

        self.config, self.optim = config, optim
        self.checkpoints = Checkpoints(work / "checkpoints", config.keep_checkpoints)
        self.stage = config.zero_stage
        trainable = [p for p in module.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            trainable,
            lr=optim.learning_rate,
            betas=optim.betas,
            eps=optim.epsilon,
            weight_decay=optim.weight_decay,
            fused=True,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _Schedule(optim, total_steps))
        self.engine, self.optimizer, _, self.schedule = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            lr_scheduler=schedule,
            config=self._deepspeed_config(micro_batches),
            dist_init_required=False,
        )
        self.module = module
        self.world = torch.distributed.get_world_size()
        self.rank = torch.distributed.get_rank()
        self._stop = False
        signal.signal(signal.SIGTERM, self._on_sigterm)

    def _deepspeed_config(self, micro_batches: int) -> dict[str, Any]:
        return {
            "train_micro_batch_size_per_gpu": 1,  # ours are counted by us; DeepSpeed only needs their number
            "gradient_accumulation_steps": micro_batches,
            # Always given: DeepSpeed clips at 1.0 when the key is absent. Stage 0 is clipped in `step`,
            # because there DeepSpeed does not tell the norm.
            "gradient_clipping": self.optim.max_grad_norm if self.stage else 0.0,
            "zero_optimization": {"stage": self.stage},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 2**31,
            "wall_clock_breakdown": False,
        }

    @property
    def device(self) -> torch.device:
        return self.engine.device

    def backward(self, loss_sum: Tensor, total: float) -> None:
        """Accumulate the gradient of `loss_sum / total`, `total` being counted over the GLOBAL batch.

        However micro-batches and ranks split the batch, the step is that of one mean over all of it.
        """
        self.engine.backward(loss_sum * (self.world / total), scale_wrt_gas=False)

    def step(self) -> float | None:
        """After each backward. Returns the gradient norm (before clipping) when the optimiser stepped."""
        boundary = self.engine.is_gradient_accumulation_boundary()
        norm: float | None = None
        if boundary and not self.stage:
            parameters = [p for p in self.module.parameters() if p.requires_grad]
            limit = self.optim.max_grad_norm or float("inf")
            norm = float(torch.nn.utils.clip_grad_norm_(parameters, limit))
            self._require_finite(norm)
        self.engine.step()
        if boundary and self.stage:
            norm = float(self.engine.get_global_grad_norm())
            self._require_finite(norm)
        return norm

    @staticmethod
    def _require_finite(norm: float) -> None:
        if not np.isfinite(norm):
            raise StageFailed(
                f"the gradient norm is {norm}",
                "Lower the learning rate, or look at the batch named in the log; the last checkpoint is kept",
            )

    @property
    def learning_rate(self) -> float:
        return float(self.schedule.get_last_lr()[0])

    # Checkpoints -------------------------------------------------------------------------------------------

    def save(self, step: int, state: dict[str, Any] | None = None) -> None:
        """Write a whole checkpoint beside the others, rename it into place, then remove older ones.

        Args:
            state: what the loop wants back from `load_latest`.
        """
        temporary = self._on_rank_0(lambda: self.checkpoints.begin(step))
        self.engine.save_checkpoint(
            str(temporary.parent), tag=temporary.name, client_state={"step": step, **(state or {})},
            save_latest=False,
        )  # fmt: skip
        save_random_state(temporary, self.rank)
        self.barrier()
        self._on_rank_0(lambda: self.checkpoints.seal(temporary, Made(step, self.world, self.stage)))

    def load_latest(self) -> dict[str, Any] | None:
        """Load the newest whole checkpoint, written by any number of ranks; None when there is none.

        Raises:
            StageFailed: all checkpoints are damaged, or of another ZeRO stage, or not seen by this node.
        """
        found = self._on_rank_0(self.checkpoints.newest)
        if found is None:
            return None
        folder, made = found
        if not folder.is_dir():
            raise StageFailed(
                f"rank {self.rank} does not see {folder}",
                "Put the workspace on storage that every node shares",
            )
        if made.zero_stage != self.stage:
            raise StageFailed(
                f"the checkpoint {folder} is of ZeRO stage {made.zero_stage} and the run of {self.stage}",
                "Resume with the stage that wrote it",
            )
        client = self._load(folder, made)
        load_random_state(folder, self.rank)
        log.info("going on from %s", folder)
        return client

    def _load(self, folder: Path, made: Made) -> dict[str, Any]:
        path, client = self.engine.load_checkpoint(str(folder.parent), tag=folder.name)
        if path is None:
            raise StageFailed(f"DeepSpeed cannot load the checkpoint {folder}", "Delete it and run again")
        return client

    def _on_rank_0(self, work: Callable[[], Found]) -> Found:
        """The result of `work`, which only rank 0 does, on every rank; its StageFailed too."""
        box: list[Any] = [None]
        if self.rank == 0:
            try:
                box = [work()]
            except StageFailed as error:
                box = [error]
        torch.distributed.broadcast_object_list(box, device=self.device)
        if isinstance(box[0], StageFailed):
            raise box[0]
        return box[0]

    def stop_requested(self) -> bool:
        """Whether SIGTERM reached any rank; all ranks get the same answer at the same step."""
        flag = torch.tensor([float(self._stop)], device=self.device)
        torch.distributed.all_reduce(flag)
        return bool(flag.item())

    def _on_sigterm(self, *_: Any) -> None:
        self._stop = True

    def barrier(self) -> None:
        torch.distributed.barrier()

    def all_sum(self, values: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        values = values.to(self.device)
        torch.distributed.all_reduce(values)
        return values

    def full_state(self) -> dict[str, Tensor]:
        """All weights of the module on rank 0, gathered where ZeRO-3 has cut them up."""
        if self.stage < 3:
            return {k: v.detach().cpu() for k, v in self.module.state_dict().items()}
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(self.module.parameters()), modifier_rank=None):
            return {k: v.detach().cpu().clone() for k, v in self.module.state_dict().items()}


class _Schedule:
    """Learning-rate factor of a step (0-based): linear warm-up, then constant, linear or cosine to zero."""

    def __init__(self, optim: OptimConfig, total_steps: int) -> None:
        self.kind = optim.schedule
        self.total = max(total_steps, 1)
        self.warmup = int(optim.warmup_fraction * total_steps)

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.kind == "constant":
            return 1.0
        progress = min((step - self.warmup) / max(self.total - self.warmup, 1), 1.0)
        return 1.0 - progress if self.kind == "linear" else 0.5 * (1.0 + float(np.cos(np.pi * progress)))


def start_distributed(config: EngineConfig) -> None:
    """Join the process group that torchrun describes; alone when there is none."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed

    # torch 2.13's cuDNN attention gives NaN gradients in bf16.
    if torch.cuda.is_available():
        torch.backends.cuda.enable_cudnn_sdp(False)
    # Only used by inference; building it needs a C++ compiler and half a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        os.environ.setdefault(name, value)
    if os.environ["WORLD_SIZE"] == "1" and "MASTER_ADDR" not in os.environ:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    torch.set_num_threads(config.threads or max(1, (os.cpu_count() or 1) // config.processes))
    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)


class MetricsFile:
    """`metrics.jsonl`: one line a step, written whole, cut back to the checkpoint on resume."""

    def __init__(self, path: Path, *, resume_after: int) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            lines = [line for line in path.read_text().splitlines() if _step_of(line) <= resume_after]
            path.write_text("".join(f"{line}\n" for line in lines))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append a step with the time of its end, in seconds since 1970."""
        numbers = {k: float(v) for k, v in values.items()}
        line = json.dumps({"step": step, "time": time.time(), **numbers})
        with self.path.open("a") as handle:
            handle.write(line + "\n")


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError):
        return float("inf")  # half a line, left by a kill
