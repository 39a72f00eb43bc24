"""The world of solid scenes: its captions and graded score, and a training from nothing."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpo_core import job as main
from dpo_core.images.records import requirements
from dpo_core.images.scenes import detect, draw
from dpo_core.images.solid import SOLID_TAGS, captioned, graded, prompts, solid_scene
from dpo_core.methods.diffusion_sft import DiffusionSftConfig
from dpo_core.methods.job import Job
from dpo_core.models.config import DenoiserConfig
from dpo_core.models.denoiser import load_denoiser
from dpo_core.models.scene_denoiser import make_scene_denoiser
from dpo_core.trainers.diffusion_sft import build
from dpo_core.training.distributed import start_distributed
from tests.support.runs.training_jobs import curve

ENGINE = {"precision": "fp32", "threads": 1}


def test_prompts_to_measure_on_are_others_and_more_than_a_hundred():
    train, held_out = ({r.prompt for r in prompts(part)} for part in (False, True))
    assert not train & held_out
    assert len(held_out) >= 100
    assert {r.tag for r in prompts(True)} == {r.tag for r in prompts(False)} == set(SOLID_TAGS)


def test_the_share_of_wrong_captions_is_seen_by_the_detector():
    asked = {r.prompt: r for part in (False, True) for r in prompts(part)}
    for wrong, low, high in ((0.0, 1.0, 1.0), (1.0, 0.0, 0.5)):
        rows = list(captioned(60, 1, wrong))
        things = detect(np.stack([pixels for _, pixels in rows]))
        holds = [
            all(r.holds for r in requirements(asked[prompt], found))
            for (prompt, _), found in zip(rows, things, strict=True)
        ]
        assert low <= np.mean(holds) <= high


def test_the_graded_score_falls_with_noise_where_the_detector_sees_nothing_any_more():
    rng = random.Random(0)
    record = next(r for r in prompts(True) if r.tag == "color_attr")
    clean = draw(solid_scene(record, rng))
    noise = np.random.default_rng(0).normal(0, 1, clean.shape)
    images = np.stack([np.clip(clean + size * noise, 0, 255).astype(np.uint8) for size in (0, 5, 40, 120)])
    scores = graded([record] * 4, images)
    assert scores[0] == scores[1] == 1, "objects that count look alike"
    assert scores[1] > scores[2] > scores[3]


def run_job(folder: Path, **fields: Any) -> dict[str, Any]:
    """A job that does not train, in this process."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.json").write_text(json.dumps({"work": str(folder), "out": str(folder)} | fields))
    assert main.main(["--config", str(folder / "job.json")]) == 0
    return json.loads((folder / "result.json").read_text())


def sft(folder: Path, made: Path) -> tuple[Any, Any]:
    """The trainer of four steps from nothing, and what writes its result."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "batch_size": 8, "micro_batch_size": 8, "max_steps": 4, "text_encoder": True, "averaging": 0.5,
        "optim": {"learning_rate": 1e-2, "warmup_fraction": 0.0}, "engine": ENGINE,
    }  # fmt: skip
    job = {
        "method": "diffusion_sft", "settings": {}, "model": str(made / "model"),
        "data": str(made / "captions.parquet"), "out": str(folder / "out"), "work": str(folder),
        "tokens": {}, "seed": 3,
    }  # fmt: skip
    return build(Job.model_validate(job), DiffusionSftConfig.model_validate(settings))


def test_training_from_nothing_resumes_exactly_and_writes_the_averages(alone, tmp_path):
    made = tmp_path / "made"
    assert run_job(made, kind="scene-captions", count=32)["images"] == 32
    make_scene_denoiser(made / "model", DenoiserConfig(layers=1, width=16, heads=2))
    start_distributed(DiffusionSftConfig(engine=ENGINE).engine)
    straight, _ = sft(tmp_path / "straight", made)
    straight.train()
    losses = [line["loss"] for line in curve(tmp_path / "straight")]
    assert losses[-1] < losses[0]
    stopped, _ = sft(tmp_path / "parts", made)
    stopped.total_steps = 2
    stopped.train()
    resumed, export = sft(tmp_path / "parts", made)
    resumed.train()
    assert [line["loss"] for line in curve(tmp_path / "parts")] == losses
    last = dict(resumed.module.named_parameters())
    for name, value in straight.average.items():
        assert value.equal(resumed.average[name]), name
        assert name.startswith(("network.", "text_encoder."))
    assert any(not value.equal(last[name]) for name, value in resumed.average.items())

    export(resumed.engine.full_state())
    written = load_denoiser(tmp_path / "parts" / "out")
    for part in ("network", "text_encoder"):
        for name, value in getattr(written, part).named_parameters():
            torch.testing.assert_close(value.detach(), resumed.average[f"{part}.{name}"])
