"""Ten steps of every objective on a tiny model: the trainer that makes them, the file that keeps them.

Run as `python -m tests.support.golden_objectives` after a definition was changed on purpose.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor

from dpo_core.methods.dpo import DpoConfig
from dpo_core.methods.kto import KtoConfig
from dpo_core.models.dropout import disable_dropout
from dpo_core.models.load import load_model
from dpo_core.objectives import get, names
from dpo_core.reference import LogpShard
from dpo_core.trainers.dpo import DpoTrainer
from dpo_core.trainers.kto import UnpairedTrainer
from dpo_core.training.distributed import start_distributed
from tests.support.runs.training_jobs import (
    pair_rows,
    token_examples,
    token_pairs,
    unpaired_rows,
    write_reference,
    write_unpaired_reference,
)

GOLDEN = Path(__file__).with_name("golden") / "objectives.json"
STEPS = 10
KEPT = ("loss", "grad_norm", "rewards/margins", "logps/chosen")

# The methods that are settings around an objective; each trains beside the objectives themselves.
VARIANTS: dict[str, dict[str, Any]] = {
    "rpo": {"plus": [{"objective": "sft", "weight": 0.5}]},
    "mpo": {
        "weight": 0.8,
        "plus": [{"objective": "bco_pair", "weight": 0.2}, {"objective": "sft", "weight": 1.0}],
    },
    "wpo": {"weighting": "wpo"},
    "tr_dpo": {"reference_sync": {"every": 3, "mix": 0.6}},
    "pre_dpo": {},
}

# Against another model than the start: Pre-DPO by its nature, DPOP because its slope jumps where policy and
# reference are equal, and the rounding of a processor would choose the course.
GUIDED = ("pre_dpo", "dpop")


def trainer_of(
    name: str,
    model: Path,
    rows: list[dict[str, Any]],
    work: Path,
    *,
    shard: Path | None = None,
    live: Path | None = None,
    reference_is_start: bool = False,
    steps: int = STEPS,
    learning_rate: float = 1e-3,
    **settings: Any,
) -> Any:
    """A trainer of an objective or variant, for pairs or unpaired rows, here: fp32, all `rows` a batch."""
    settings = VARIANTS.get(name, {}) | settings
    unpaired = kind_of(name) == "unpaired"
    config = (KtoConfig if unpaired else DpoConfig)(
        objective="dpo" if name in VARIANTS else name,
        **{"batch_size": len(rows), "micro_batch_size": len(rows), "epochs": 100.0, "max_steps": steps}
        | settings,
        optim={"learning_rate": learning_rate, "schedule": "constant", "warmup_fraction": 0.0},
        engine={"precision": "fp32", "threads": 1, "save_every": 100},
    )
    start_distributed(config.engine)
    module = load_model(model)
    disable_dropout(module)
    shared: dict[str, Any] = {
        "reference": LogpShard.open(shard) if shard else None,
        "policy_is_reference": reference_is_start,
        "seed": 3,
        "work": work,
    }
    if isinstance(config, KtoConfig):
        return UnpairedTrainer(module.train(), token_examples(model, rows), config, **shared)
    reference = load_model(live) if live else None
    return DpoTrainer(module.train(), token_pairs(model, rows), config, live_reference=reference, **shared)


def step_of(trainer: DpoTrainer | UnpairedTrainer, split: list[list[int]]) -> tuple[float, list[Tensor]]:
    """Loss and gradient of one global batch, forwarded in the given parts."""
    examples = trainer.examples
    trainer.module.zero_grad()
    trainer.begin_step([examples[i] for part in split for i in part])
    total = 0.0
    for part in split:
        loss, _ = trainer.losses([examples[i] for i in part])
        (loss / len(examples)).backward()
        total += float(loss.detach()) / len(examples)
    return total, [p.grad.clone() for p in trainer.module.parameters() if p.grad is not None]


def kind_of(name: str) -> str:
    """Pairs, or unpaired rows."""
    return "pairs" if name in VARIANTS else get(name).data


def main() -> None:
    from tests.support.models.tiny import make_tiny_model

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        tiny = make_tiny_model(Path(folder) / "tiny")
        guide = make_tiny_model(Path(folder) / "guide", seed=5)
        data = {"pairs": pair_rows(12), "unpaired": unpaired_rows(12)}
        shards = {
            "pairs": write_reference(tiny, data["pairs"], Path(folder) / "pairs"),
            "unpaired": write_unpaired_reference(tiny, data["unpaired"], Path(folder) / "unpaired"),
        }
        guided = write_reference(guide, data["pairs"], Path(folder) / "guided")
        for name in (*names(), *VARIANTS):
            work, kind = Path(folder) / name, kind_of(name)
            shard = guided if name in GUIDED else shards[kind]
            start: dict[str, Any] = {"shard": shard, "live": tiny, "reference_is_start": name not in GUIDED}
            trainer_of(name, tiny, data[kind], work, **start).train()
            lines = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
            found[name] = {kept: [float(f"{line[kept]:.7g}") for line in lines] for kept in KEPT}
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
