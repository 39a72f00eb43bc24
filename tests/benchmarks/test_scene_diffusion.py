"""Diffusion-DPO on solid scenes: a reference from nothing, pairs by the detector, gain on held-out prompts.

Prints every number (`-s`). `SIZES` are those of the bars; smaller ones only try the chain.
"""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from dpo_core import job as main
from dpo_core.methods.diffusion import DiffusionConfig
from dpo_core.methods.diffusion_sft import DiffusionSftConfig
from dpo_core.methods.job import Job
from dpo_core.statistics.estimates import paired_bootstrap
from dpo_core.trainers import diffusion, diffusion_sft
from dpo_core.training.distributed import start_distributed
from dpo_core.training.engine import read_metrics
from tests.dpo_core.conftest import _process_group, alone  # noqa: F401  the process group that trainers need

Metrics = list[dict[str, float]]

pytestmark = pytest.mark.bench

SIZES = {"captions": 128_000, "steps": 8000, "samples": 8, "align": 60, "measured": 4, "denoising": 20}
ENGINE: dict[str, Any] = {"precision": "fp32", "threads": 2, "save_every": 500}


def make(folder: Path, **fields: Any) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.json").write_text(json.dumps({"work": str(folder), "out": str(folder)} | fields))
    assert main.main(["--config", str(folder / "job.json")]) == 0
    return json.loads((folder / "result.json").read_text())


def train(
    folder: Path, module: Any, config: Any, model: Path, data: Path, seed: int
) -> list[dict[str, float]]:
    """Train and write `folder/out`; returns the lines of the metrics."""
    job = {
        "method": module.__name__.rpartition(".")[2], "settings": {}, "model": str(model), "data": str(data),
        "out": str(folder / "out"), "work": str(folder), "tokens": {}, "seed": seed,
    }  # fmt: skip
    trainer, export = module.build(Job.model_validate(job), config)
    trainer.train()
    export(trainer.engine.full_state())
    return read_metrics(folder / "metrics.jsonl")


def images(folder: Path, model: Path, held_out: bool, seed: int) -> tuple[dict[str, Any], pd.DataFrame]:
    samples = SIZES["measured"] if held_out else SIZES["samples"]
    fields = {"model": str(model), "held_out": held_out, "samples": samples, "steps": SIZES["denoising"]}
    result = make(folder, kind="scene-images", seed=seed, **fields)
    print(folder.name, json.dumps(result))
    return result, pd.read_parquet(folder / "images.parquet")


def align(folder: Path, reference: Path, pairs: Path, seed: int, **changes: Any) -> Metrics:
    settings = {
        "kappa": 1.0, "optim": {"learning_rate": 2e-5}, "batch_size": 16, "micro_batch_size": 16,
        "epochs": 1000.0, "max_steps": SIZES["align"], "engine": ENGINE,
    }  # fmt: skip
    config = DiffusionConfig.model_validate(settings | changes)
    rows = train(folder, diffusion, config, reference, pairs, seed)
    end = rows[-max(1, len(rows) // 10) :]
    error = np.mean([row["error/chosen"] for row in end])
    print(folder.name, f"error of chosen images: {error:.3f} of the reference's")
    return end


@pytest.mark.usefixtures("alone")
def test_diffusion_dpo_on_a_reference_worth_aligning(tmp_path, caplog):
    made = tmp_path / "made"
    make(made, kind="scene-captions", count=SIZES["captions"], wrong=0.25)
    start_distributed(DiffusionSftConfig(engine=ENGINE).engine)
    optim = {"learning_rate": 1.5e-3, "betas": [0.9, 0.99], "weight_decay": 0.01, "schedule": "cosine"}
    sft = DiffusionSftConfig.model_validate(
        {
            "batch_size": 64, "micro_batch_size": 64, "epochs": 1000.0, "max_steps": SIZES["steps"],
            "text_encoder": True, "averaging": 0.998, "engine": ENGINE,
            "optim": optim | {"warmup_fraction": 0.03},
        }
    )  # fmt: skip
    train(tmp_path / "sft", diffusion_sft, sft, made / "model", made / "captions.parquet", 0)
    reference = tmp_path / "sft" / "out"
    before, measured = images(tmp_path / "reference", reference, True, seed=100)

    gains, prompts = [], []
    for seed in range(3):
        images(tmp_path / f"pairs-{seed}", reference, False, seed=seed)
        pairs = tmp_path / f"pairs-{seed}" / "pairs.parquet"
        end = align(tmp_path / f"dpo-{seed}", reference, pairs, seed)
        assert np.mean([row["error/chosen"] for row in end]) <= 1.2
        # The same first noise as the reference's images.
        _, aligned = images(tmp_path / f"aligned-{seed}", tmp_path / f"dpo-{seed}" / "out", True, seed=100)
        gain = paired_bootstrap(aligned["correct"], measured["correct"], measured["prompt"].tolist())
        print(f"seed {seed}: gain {gain}")
        gains.append(aligned["correct"] - measured["correct"])
        prompts += measured["prompt"].tolist()
    both = np.concatenate(gains)
    total = paired_bootstrap(both, np.zeros(len(both)), prompts)
    print(f"three seeds: gain {total} on {measured['prompt'].nunique()} prompts")

    with caplog.at_level(logging.WARNING):
        align(
            tmp_path / "hacked", reference, tmp_path / "pairs-0" / "pairs.parquet", 0,
            kappa=0.3, optim={"learning_rate": 1e-4},
        )  # fmt: skip
    print("hacked setting:", "alarm" if "likelihood displacement" in caplog.text else "no alarm")
    assert before["score"] >= 0.3
    assert total.low > 0
    assert "likelihood displacement" in caplog.text
