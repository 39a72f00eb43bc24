"""`Engine`, a small wrapper of DeepSpeed: build, step, save and resume checkpoints, export weights.

One process on a laptop and many nodes run the same code.
"""

import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from dpo_core.errors import NeedsNewSettings, StageFailed
from dpo_core.training.checkpoints import (
    CheckpointInfo,
    Checkpoints,
    load_random_state,
    restricted_unpickling,
    save_random_state,
    to_universal,
)
from dpo_core.training.config import EngineConfig, OptimConfig
from dpo_core.training.distributed import limit_waiting
from dpo_core.training.schedule import LearningRateSchedule
from dpo_core.training.stop import StopSignals

log = logging.getLogger(__name__)
Result = TypeVar("Result")


class Engine:
    """A module under DeepSpeed, with its optimiser, schedule, checkpoints and stop signals.

    Args:
        module: its parameters that require gradients are trained.
        micro_batches: backward calls before each optimiser step, on every rank.
        work: folder of this job; checkpoints are in `work/checkpoints`.
        companions: engines made before this one (a critic), by name. They are saved and loaded in the same
            checkpoint, so that they are always at the same step.
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
        companions: Mapping[str, "Engine"] | None = None,
    ) -> None:
        import deepspeed  # noqa: PLC0415 - after set_accelerator

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
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, LearningRateSchedule(optim, total_steps))
        self.module = module
        self.engine, self.optimizer, _, self.schedule = deepspeed.initialize(
            model=_Root(module),
            optimizer=optimizer,
            lr_scheduler=schedule,
            config=self._deepspeed_config(micro_batches),
            dist_init_required=False,
        )
        self.world = torch.distributed.get_world_size()
        self.rank = torch.distributed.get_rank()
        if self.world == 1 and not self.stage:
            # With one rank the all-reduce would only copy all gradients into one tensor and back.
            self.engine.enable_backward_allreduce = False
        self.companions = dict(companions or {})
        # The engine made last, which has the companions, handles the signals.
        self.signals = StopSignals()

    def _deepspeed_config(self, micro_batches: int) -> dict[str, Any]:
        return {
            "train_micro_batch_size_per_gpu": 1,  # not used: `backward` divides by the size of the batch
            "gradient_accumulation_steps": micro_batches,
            # Always set: DeepSpeed clips at 1.0 when the key is absent. Stage 0 is clipped in `step`, because
            # DeepSpeed does not report the norm there.
            "gradient_clipping": self.optim.max_grad_norm if self.stage else 0.0,
            "zero_optimization": self._zero_config(),
            "zero_allow_untested_optimizer": True,
            # torch's AdamW also works on offloaded state; DeepSpeed's would have to be compiled here.
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 2**31,
            "wall_clock_breakdown": False,
        }

    def _zero_config(self) -> dict[str, Any]:
        zero: dict[str, Any] = {"stage": self.stage}
        host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        if self.config.offload != "none":
            zero["offload_optimizer"] = host
        if self.config.offload == "parameters":
            zero["offload_param"] = host
        if self.stage == 3:
            # Small parameters are not sharded: gathering them costs more than storing them. The limit depends
            # on the model, so that small models are sharded as large ones are.
            largest = max(p.numel() for p in self.module.parameters())
            zero["stage3_param_persistence_threshold"] = min(100_000, largest // 16)
        return zero

    @property
    def device(self) -> torch.device:
        return self.engine.device

    def run(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """Run `work(*arguments)` as the engine's forward pass.

        Code that reads the module's parameters must run in it: outside, ZeRO 3 has them sharded.
        """
        return self.engine(lambda: work(*arguments))

    def backward(self, loss_sum: Tensor, total: float) -> None:
        """Accumulate the gradient of `loss_sum / total`, with `total` counted over the GLOBAL batch.

        The step then has the gradient of one mean over the batch, however it is split.
        """
        self.engine.backward(loss_sum * (self.world / total), scale_wrt_gas=False)

    def step(self, batch: str = "the batch") -> float | None:
        """Call after each `backward`. Returns the gradient norm before clipping if the optimiser stepped.

        Args:
            batch: what the error calls it.

        Raises:
            StageFailed: the gradient norm is not finite.
        """
        boundary = self.engine.is_gradient_accumulation_boundary()
        norm: float | None = None
        if boundary and not self.stage:
            parameters = [p for p in self.module.parameters() if p.requires_grad]
            limit = self.optim.max_grad_norm or float("inf")
            norm = float(torch.nn.utils.clip_grad_norm_(parameters, limit))
            self._require_finite(norm, batch)
        self.engine.step()
        if boundary and self.stage:
            norm = float(self.engine.get_global_grad_norm())
            self._require_finite(norm, batch)
        return norm

    @staticmethod
    def _require_finite(norm: float, batch: str) -> None:
        if not np.isfinite(norm):
            raise NeedsNewSettings(
                f"the gradient norm of {batch} is {norm}",
                "Look at its rows, or lower the learning rate",
            )

    @property
    def learning_rate(self) -> float:
        return float(self.schedule.get_last_lr()[0])

    # Checkpoints -------------------------------------------------------------------------------------------

    def save(self, step: int, state: dict[str, Any] | None = None) -> None:
        """Write a checkpoint, then remove older ones.

        Args:
            state: the trainer's own state, which `load_latest` returns.
        """
        temporary = self._on_rank_0(lambda: self.checkpoints.begin(step))
        self.engine.save_checkpoint(
            str(temporary.parent), tag=temporary.name, client_state={"step": step, **(state or {})},
            save_latest=False,
        )  # fmt: skip
        for name, other in self.companions.items():
            other.engine.save_checkpoint(str(temporary), tag=name, save_latest=False)
        save_random_state(temporary, self.rank)
        self.barrier()
        self._on_rank_0(
            lambda: self.checkpoints.commit(temporary, CheckpointInfo(step, self.world, self.stage))
        )

    def load_latest(self) -> dict[str, Any] | None:
        """Load the newest undamaged checkpoint, written by any number of ranks; None if there is none.

        Raises:
            StageFailed: every checkpoint is damaged, or the newest has another ZeRO stage, or this node
                cannot see it.
        """
        newest = self._on_rank_0(self.checkpoints.newest)
        state = self._restore(*newest) if newest else None
        if newest:
            self._on_rank_0(lambda: self.checkpoints.restore_curve(newest[0]))
        # Not earlier: rank 0 may take longer to convert a checkpoint than the others may wait in a step.
        limit_waiting(self.config.timeout_seconds)
        return state

    def _restore(self, folder: Path, info: CheckpointInfo) -> dict[str, Any]:
        if not folder.is_dir():
            raise StageFailed(
                f"rank {self.rank} cannot see {folder}",
                "Put the workspace on storage that every node shares",
            )
        if info.zero_stage != self.stage:
            raise StageFailed(
                f"the checkpoint {folder} was written with ZeRO stage {info.zero_stage}, but the run uses "
                f"stage {self.stage}",
                f"Resume with zero_stage {info.zero_stage}",
            )
        state = self._load(folder, info)
        for name, other in self.companions.items():
            other._load(folder / name, info)
        load_random_state(folder, self.rank)
        log.info("resuming from %s", folder)
        return state

    def _load(self, folder: Path, info: CheckpointInfo) -> dict[str, Any]:
        # Without ZeRO the checkpoint is one file, which any number of ranks can load.
        convert = info.ranks != self.world and self.stage > 0
        if convert:
            log.info("%s was written by %d ranks; converting it for %d", folder, info.ranks, self.world)
            source, folder = folder, folder.parent / "tmp-universal" / folder.name
            self._on_rank_0(lambda: to_universal(source, folder))
        # Set for this load only, because the flag also changes how DeepSpeed names files.
        self.engine._config.load_universal_checkpoint = convert
        with restricted_unpickling(folder):
            path, state = self.engine.load_checkpoint(str(folder.parent), tag=folder.name)
        self.engine._config.load_universal_checkpoint = False
        if path is None:
            raise StageFailed(f"DeepSpeed cannot load the checkpoint {folder}", "Delete it and run again")
        self.barrier()
        if convert:
            self._on_rank_0(lambda: shutil.rmtree(folder.parent))
        return state

    def _on_rank_0(self, work: Callable[[], Result]) -> Result:
        """Run `work` on rank 0 and return its result, or raise its StageFailed, on every rank."""
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
        """Whether any rank has received a stop signal; all ranks get the same answer at the same step."""
        flag = torch.tensor([float(self.signals.received)], device=self.device)
        torch.distributed.all_reduce(flag)
        return bool(flag.item())

    def barrier(self) -> None:
        torch.distributed.barrier()

    def all_sum(self, values: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        values = values.to(self.device)
        torch.distributed.all_reduce(values)
        return values

    def all_max(self, values: Tensor) -> Tensor:
        """Largest over ranks, in place."""
        values = values.to(self.device)
        torch.distributed.all_reduce(values, op=torch.distributed.ReduceOp.MAX)
        return values

    def full_state(self) -> dict[str, Tensor]:
        """All weights of the module on rank 0, after training; other ranks may get none.

        With ZeRO 3 the module becomes a plain one again; see `load_full_state`.
        """
        if self.stage < 3:
            return {k: v.detach().cpu() for k, v in self.module.state_dict().items()}
        import deepspeed  # noqa: PLC0415 - after set_accelerator

        state: dict[str, Tensor] = {}
        with deepspeed.zero.GatheredParameters(list(self.module.parameters()), modifier_rank=None):
            if self.rank == 0:
                state = {k: v.detach().cpu().clone() for k, v in self.module.state_dict().items()}
        self.engine.destroy()
        return state


def load_full_state(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Set the tensors of a module to those of `full_state`, even if ZeRO 3 has left empty ones."""
    live: dict[str, Tensor] = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    for name, tensor in state.items():
        live[name].data = tensor.to(live[name].device)


class _Root(nn.Module):
    """The outermost module, which DeepSpeed wraps: its forward pass runs any function that uses the module.

    Losses read the output head's weight directly, and ZeRO 3 gathers a parameter that is read outside its own
    layer only during the forward pass of the outermost module.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, work: Callable[[], Any]) -> Any:
        return work()


class MetricsFile:
    """`metrics.jsonl`: one line for each step. On resume, the lines after the checkpoint are removed."""

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


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a `metrics.jsonl`."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError):
        return float("inf")  # an incomplete line, left by a kill
