"""A whole run of a tiny diffusion model: every objective, the suite, and images on the page."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from tests.support.models.tiny_diffusion import image_rows, make_tiny_diffusion
from tests.support.runs.tiny_run import Bench

ENGINE = {"precision": "fp32", "threads": 1}
SAMPLING = {"denoising_steps": 2, "guidance": 2.0}
PAIRS = {
    "method": "diffusion", "kappa": 1.0, "batch_size": 8, "micro_batch_size": 8, "epochs": 100,
    "max_steps": 2, "optim": {"learning_rate": 1e-4}, "engine": ENGINE,
}  # fmt: skip
RECIPE: dict[str, Any] = {
    "name": "tiny-diffusion",
    "model": {"denoiser": {"layers": 1, "width": 16, "heads": 2}},
    "data": {"solid_scenes": True},
    "diffusion_sft": {
        "made_scenes": 32, "text_encoder": True, "batch_size": 8, "micro_batch_size": 8, "max_steps": 4,
        "optim": {"learning_rate": 1e-2}, "engine": ENGINE,
    },
    "pairs": {"samples_per_prompt": 2, "pairing": "extremes", "sampling": SAMPLING},
    "reward": {"source": "scenes:graded"},
    "policies": {
        "DPO": PAIRS,
        "KTO": PAIRS | {"objective": "kto"},
        "kl_plus": PAIRS | {"objective": "kl_plus", "parameters": {"c": 0.5}, "start": "DPO"},
    },
    "evaluate": {"prompts": 3, "samples_per_prompt": 2, "sampling": SAMPLING},
    "suites": {"names": ["scenes_solid"], "settings": {"limit": 40, "sampling": SAMPLING}},
    "promotion": {
        "primary": "scenes_solid/score", "alarms": ["Likelihood displacement"],
        "categories": ["scenes_solid"],
    },
}  # fmt: skip


@pytest.mark.slow
def test_a_diffusion_model_is_made_aligned_measured_and_shown(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(RECIPE | {"workspace": str(tmp_path / "runs")}))
    bench = Bench(tmp_path)
    planned = bench.dpo("plan", str(bench.recipe))
    assert "memory of diffusion models is not estimated" in planned.stdout, planned.stderr
    report = bench.run()
    rows = {row["name"]: row for row in report["evaluation"]["policies"]}
    assert rows.keys() == {"SFT", *RECIPE["policies"]}
    assert all(row["kl"] is None and row["length"] is None for row in rows.values())
    assert report["win_rates"] == [], "images have no lengths to control for"
    rules = {reason["rule"] for reason in report["decision"]["reasons"]}
    assert {"min_gain", "categories", "alarms"} <= rules
    assert "max_kl" not in rules
    (gain,) = [r["text"] for r in report["decision"]["reasons"] if r["rule"] == "min_gain"]
    assert "scenes_solid" in gain
    page = (tmp_path / "runs" / "runs" / report["run"]["name"] / "page.html").read_text()
    assert page.count('<img src="data:image/png;base64,') == 3 * 2 * len(rows)
    assert "Denoising error" in page
    assert set(bench.states(bench.run()).values()) == {"cached"}


REWARD = """
import numpy as np

def redness(prompts, images):
    return [float(np.asarray(image)[..., 0].mean()) for image in images]
"""


@pytest.mark.slow
def test_pairs_of_people_align_a_folder_of_diffusers(tmp_path: Path) -> None:
    """Pick-a-Pic's rows and one's own model and reward; then the commands on the finished run."""
    rows = [
        {"caption": f"{row['prompt']} {chr(97 + i)}", "jpg_0": row["chosen"], "jpg_1": row["rejected"],
         "label_0": float(i % 2), "label_1": float(1 - i % 2)}
        for i, row in enumerate(image_rows(20))
    ]  # fmt: skip
    pd.DataFrame(rows).to_parquet(tmp_path / "picks.parquet", index=False)
    make_tiny_diffusion(tmp_path / "model", "pixels")
    (tmp_path / "mine.py").write_text(REWARD)
    recipe = RECIPE | {
        "name": "tiny-pairs",
        "workspace": str(tmp_path / "runs"),
        "model": {"name": str(tmp_path / "model")},
        "data": {"path": str(tmp_path / "picks.parquet"), "images": str(tmp_path), "eval_fraction": 0.3},
        "reward": {"source": f"{tmp_path}/mine.py:redness"},
        "policies": {"DPO": PAIRS},
        "suites": {},
        "promotion": {},
    }
    del recipe["diffusion_sft"]
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    bench = Bench(tmp_path)
    report = bench.run()
    assert report["gate"][0]["subject"] == "pairs"
    assert {stage["name"] for stage in report["stages"]} == {
        "load-data", "import-model", "validate-pairs", "train-diffusion DPO", "evaluate"
    }  # fmt: skip
    run = report["run"]["name"]
    sizes = ["--suite", "scenes_solid", "--set", "settings.limit=6"]
    sizes += ["--set", "settings.sampling.denoising_steps=2"]
    compared = bench.dpo("compare", f"{run}:DPO", f"{run}:SFT", *sizes, "--json")
    assert compared.returncode == 0, compared.stderr
    (comparison,) = json.loads(compared.stdout)["comparisons"]
    assert "score" in {row["measure"] for row in comparison["rows"]}
    evaluated = bench.dpo("evaluate", str(tmp_path / "model"), *sizes)
    assert evaluated.returncode == 0, evaluated.stderr
    refused = bench.dpo("evaluate", str(tmp_path / "model"), "--suite", "scenes")
    assert "is a diffusion model, and the suite is of language models" in refused.stderr
    promoted = bench.dpo("promote", run, "--force", "--reason", "a test")
    assert promoted.returncode == 0, promoted.stderr
    again = bench.run("--set", "model.name=models:/dpo-tiny-pairs@champion", "--set", "seed=1")
    assert again["trained"]["started_from"]["name"] == "models:/dpo-tiny-pairs/1"
    assert {row["name"] for row in again["evaluation"]["policies"]} == {"SFT", "DPO", "Champion"}
