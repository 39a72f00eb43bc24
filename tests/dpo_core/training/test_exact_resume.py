"""Six straight steps equal three, SIGKILL, and three more: losses, norms, rates and weights, bit for bit.

The killed part is a process of its own, and leaves what a kill may leave: a line of metrics after the last
checkpoint. Ranks and nodes that are lost: tests/scenarios/faults/test_two_nodes.py.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dpo_core import job as train
from tests.support.runs.killed_job import kill_after
from tests.support.runs.training_jobs import (
    curve,
    demonstrations,
    pair_rows,
    timeless,
    write_job,
    write_reference,
)


@dataclass(frozen=True)
class Case:
    kind: str
    rows: int = 16
    batch: int = 8
    micro: int = 8
    engine: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    needs: str | None = None


def slow(name: str, case: Case) -> Any:
    return pytest.param(case, id=name, marks=pytest.mark.faults)


LORA = {"lora": {"rank": 4}}
# With 10 rows and batches of 4, the third batch and the fifth hold the end of an epoch and its successor.
CASES = [
    pytest.param(Case("dpo", rows=10, batch=4, micro=1), id="dpo-accumulation-epochs"),
    slow("sft-accumulation-epochs", Case("sft", rows=10, batch=4, micro=2)),
    slow("dpo-one-epoch", Case("dpo", rows=48)),
    slow("dpo-bf16", Case("dpo", micro=2, engine={"precision": "bf16"})),
    slow("dpo-recompute", Case("dpo", micro=2, engine={"gradient_checkpointing": True})),
    slow("dpo-zero-1", Case("dpo", micro=2, engine={"zero_stage": 1})),
    slow("dpo-zero-2", Case("dpo", micro=2, engine={"zero_stage": 2})),
    slow("dpo-zero-3", Case("dpo", micro=2, engine={"zero_stage": 3})),
    slow("dpo-offload", Case("dpo", micro=2, engine={"zero_stage": 3, "offload": "parameters"})),
    slow("reward", Case("reward", rows=10, batch=4, micro=2)),
    slow("dpo-lora", Case("dpo", rows=10, batch=4, micro=2, settings=LORA, needs="peft")),
    slow("sft-lora", Case("sft", rows=10, batch=4, micro=2, settings=LORA, needs="peft")),
    slow("sft-lora-zero-3", Case("sft", micro=2, settings=LORA, engine={"zero_stage": 3}, needs="peft")),
]


def write(folder: Path, tiny: Path, case: Case) -> Path:
    rows = pair_rows(case.rows)
    extra: dict[str, Any] = {}
    if case.kind == "dpo":
        extra["reference_logps"] = str(write_reference(tiny, rows, folder / "reference"))
    if case.kind == "sft":
        rows = demonstrations(rows)
    settings = {
        "batch_size": case.batch,
        "micro_batch_size": case.micro,
        "epochs": 100.0,
        "max_steps": 6,
        "optim": {"learning_rate": 1e-3, "schedule": "cosine", "warmup_fraction": 0.4},
        "engine": {"precision": "fp32", "threads": 1, "save_every": 3} | case.engine,
    }
    return write_job(folder, case.kind, tiny, rows, settings=settings | case.settings, **extra)


def tensors(value: Any, path: str = "") -> dict[str, Any]:
    """Every leaf of nested containers, by its path."""
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list | tuple):
        items = list(enumerate(value))
    else:
        return {path: value}
    return {k: v for key, inner in items for k, v in tensors(inner, f"{path}/{key}").items()}


def last_optimiser(work: Path) -> dict[str, Any]:
    """The optimiser's state and the schedule's in the last checkpoint."""
    folder = work / "checkpoints" / "step-00000006"
    values: dict[str, Any] = {}
    for file in [*folder.glob("*model_states.pt"), *folder.glob("*optim_states.pt")]:
        saved = torch.load(file, weights_only=False)
        for name in ("optimizer", "optimizer_state_dict", "lr_scheduler"):
            values |= tensors(saved.get(name), f"{file.name}/{name}")
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor | float | int)}


@pytest.mark.parametrize("case", CASES)
def test_three_steps_a_kill_and_three_are_six(alone: None, tiny: Path, tmp_path: Path, case: Case) -> None:
    if case.needs:
        pytest.importorskip(case.needs)
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert train.main(["--config", str(write(straight, tiny, case))]) == 0
    job = write(killed, tiny, case)
    kill_after(4, job)
    assert [line["step"] for line in curve(killed)] == [1, 2, 3, 4], "the fourth step was not saved"
    assert [p.name for p in (killed / "checkpoints").glob("step-*")] == ["step-00000003"]
    assert train.main(["--config", str(job)]) == 0

    assert timeless(killed) == timeless(straight)
    assert [line["step"] for line in timeless(killed)] == [1, 2, 3, 4, 5, 6]
    assert len({line["learning_rate"] for line in timeless(killed)}) > 3, "the schedule moved"
    assert all(line["grad_norm"] > 0 for line in timeless(killed))
    ours, theirs = (last_optimiser(work) for work in (killed, straight))
    assert ours.keys() == theirs.keys()
    assert sum(isinstance(value, torch.Tensor) for value in theirs.values()) >= 2, "both moments"
    for name, value in theirs.items():
        same = ours[name].equal(value) if isinstance(value, torch.Tensor) else ours[name] == value
        assert same, name
    for file in straight.glob("out/**/*.safetensors"):
        weights = load_file(file)
        again = load_file(killed / file.relative_to(straight))
        assert weights.keys() == again.keys()
        for name, tensor in weights.items():
            assert again[name].equal(tensor), name
