"""Estimate how fast this machine trains: from earlier runs of the workspace, else from a short timing."""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from pydantic import ValidationError

from dpo_core.methods.registry import methods
from dpo_core.scoring.autocast import effective_precision
from dpo_core.scoring.matmul_rate import matmul_rate
from dpo_core.scoring.precision import Precision
from tasks.reports.run_report import RunReport, StageRow
from tasks.stages.registry import is_stage, stage_of
from tasks.store.facts import Facts, facts_of
from tasks.store.store import Store

# The share of a bare matrix product's speed that a training step reaches.
_EFFICIENCY = 0.5
# In smaller stages the start-up time dominates.
_ENOUGH_FLOPS = 1e12


@dataclass(frozen=True)
class Speed:
    """Operations per second of this machine, and the times of earlier stages."""

    device: str
    on_gpu: bool
    memory_bytes: int
    measured: float | None
    """Operations per second of earlier trainings; None without such."""
    source: str
    earlier: dict[str, list[float]] = field(default_factory=dict)
    """Seconds of earlier runs of each stage."""
    timed: dict[str, float] = field(default_factory=dict)
    """Operations per second of a matrix product, by precision; measured at the first use."""

    @classmethod
    def of(cls, workspace: str) -> "Speed":
        """Read the reports of the workspace, and query the machine."""
        earlier: dict[str, list[float]] = {}
        flops = seconds = 0.0
        count = 0
        for row in _stages_run(Path(workspace)):
            earlier.setdefault(row.name, []).append(row.seconds)
            operations = _operations(workspace, row)
            spent = row.seconds - stage_of(row.name).overhead
            if operations >= _ENOUGH_FLOPS and spent > 0:
                flops, seconds, count = flops + operations, seconds + spent, count + 1
        gpu = torch.cuda.is_available()
        return cls(
            device=torch.cuda.get_device_name(0) if gpu else f"CPU, {torch.get_num_threads()} threads",
            on_gpu=gpu,
            memory_bytes=torch.cuda.get_device_properties(0).total_memory
            if gpu
            else psutil.virtual_memory().total,
            measured=flops / seconds if count else None,
            source=f"{count} earlier training stages in this workspace"
            if count
            else "a short timing of matrix products; rough",
            earlier=earlier,
        )

    def seconds(self, stage: str, flops: float, precision: Precision, processes: int) -> float:
        """Estimated time of a stage."""
        overhead = stage_of(stage).overhead
        if not flops:
            return statistics.median(self.earlier[stage]) if stage in self.earlier else overhead
        rate = self.measured or _EFFICIENCY * self._matmul(precision)
        # Ranks on one CPU share its cores.
        return overhead + flops / (rate * (processes if self.on_gpu else 1))

    def _matmul(self, precision: Precision) -> float:
        precision = effective_precision(precision, "cuda" if self.on_gpu else "cpu")
        if precision not in self.timed:
            self.timed[precision] = matmul_rate(torch.bfloat16 if precision == "bf16" else torch.float32)
        return self.timed[precision]


def _stages_run(workspace: Path) -> Iterator[StageRow]:
    for path in sorted((workspace / "runs").glob("*/report.json")):
        try:
            report = RunReport.model_validate_json(path.read_bytes())
        except (OSError, ValidationError):
            continue
        yield from (row for row in report.stages if row.state == "ran" and is_stage(row.name))


def _operations(workspace: str, row: StageRow) -> float:
    """Operations that a training counted; 0 for methods that sample, which are slower."""
    samplers = {method.stage for method in methods().values() if method.scored}
    if row.kind != "model" or row.name.partition(" ")[0] in samplers:
        return 0.0
    for manifest in Store(workspace).history(row.name.partition(" ")[0]):
        if manifest.sha256 == row.sha256:
            return facts_of(manifest, Facts).flops or 0.0
    return 0.0
