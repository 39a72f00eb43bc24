"""A whole run of scenes on a tiny model: every method, the suites, and images on the page."""

from pathlib import Path

import pytest
import yaml

from tests.support.runs.tiny_run import Bench

REWARD = """
import numpy as np

def painted(prompts, images, metadata):
    return [float((np.asarray(image).max(-1) > 0).mean()) for image in images]
"""
ENGINE = {"precision": "fp32", "threads": 1}
ROUND = {"episodes": 16, "micro_batch_size": 16, "engine": ENGINE}
PAIRS = {"batch_size": 8, "micro_batch_size": 8, "pack_tokens": None, "max_steps": 2, "engine": ENGINE}
SAMPLING = {"max_new_tokens": 64, "precision": "fp32"}
RECIPE = {
    "name": "tiny-scenes",
    "model": {
        "name": "package:dpo_core.images.scenes_model",
        "scratch": {"layers": 1, "hidden_size": 32, "heads": 2},
    },
    "data": {"scenes": 5, "eval_fraction": 0.3},
    "tokens": {"max_length": 88, "max_prompt_length": 24},
    "sft": {
        "made_scenes": 2048,
        "batch_size": 32,
        "micro_batch_size": 32,
        "pack_tokens": None,
        "optim": {"learning_rate": 1e-2},
        "engine": ENGINE,
    },
    "pairs": {"samples_per_prompt": 8, "pairing": "extremes", "sampling": SAMPLING},
    "reward": {"source": "scenes:exact"},
    "policies": {
        "DPO": {"method": "dpo", **PAIRS},
        "KTO": {"method": "kto", **PAIRS},
        "Iterative DPO": {
            "method": "online_dpo", "iterations": 1, "samples_per_prompt": 2, "renew_reference": True,
            **ROUND, "micro_batch_size": 8,
        },
        "GRPO": {
            "method": "grpo", "iterations": 1, "group_size": 4, "guidance": 2.0, "score": "guided", **ROUND
        },
    },
    "evaluate": {"prompts": 6, "samples_per_prompt": 2, "sampling": SAMPLING, "precision": "fp32"},
    "suites": {
        "names": ["scenes", "scenes_gen"],
        "settings": {"limit": 40, "sampling": SAMPLING | {"guidance": 2.0}, "precision": "fp32"},
    },
    "promotion": {"primary": "scenes_gen/score", "categories": ["scenes_gen"]},
}  # fmt: skip


@pytest.mark.slow
def test_images_are_aligned_by_every_method_and_shown(tmp_path: Path) -> None:
    (tmp_path / "painted.py").write_text(REWARD)
    # A model this small fulfils no prompt: a reward in which its images differ.
    reward = {"source": f"{tmp_path / 'painted.py'}:painted"}
    recipe = RECIPE | {"workspace": str(tmp_path / "runs"), "reward": reward}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    bench = Bench(tmp_path)
    report = bench.run()
    rows = {row["name"]: row for row in report["evaluation"]["policies"]}
    assert rows.keys() == {"SFT", *RECIPE["policies"]}
    assert all(row["ended"] == 1 and row["length"]["value"] == 64 for row in rows.values())
    assert "categories" in {reason["rule"] for reason in report["decision"]["reasons"]}
    assert {result["suite"] for result in report["suites"]} == {"scenes", "scenes_gen"}
    page = (tmp_path / "runs" / "runs" / report["run"]["name"] / "page.html").read_text()
    assert page.count('<img src="data:image/png;base64,') == 6 * 2 * len(rows)
    assert "KL of guided sampling" in page
    assert set(bench.states(bench.run()).values()) == {"cached"}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"policies": {"GRPO": {"method": "grpo", "missing_eos_penalty": 1.0}}}, "no effect on images"),
        ({"policies": {"GRPO": {"method": "grpo", "mask_truncated": True}}}, "no effect on images"),
        ({"policies": {"GRPO": {"method": "grpo", "soft_overlong": 4}}}, "no effect on images"),
        ({"policies": {"GRPO": {"method": "grpo", "guidance": 2.0}}}, "guidance needs score"),
        ({"policies": {"GRPO": {"method": "grpo", "score": "guided"}}}, "guidance is 1"),
        ({"evaluate": {"sampling": SAMPLING | {"guidance": 2.0}}}, "KL of another distribution"),
        ({"sft": {}}, "set sft.demonstrations"),
    ],
)
def test_recipes_that_make_no_sense_for_images_are_refused(change: dict, told: str) -> None:
    from tasks.recipe.recipe import Recipe

    with pytest.raises(ValueError, match=told):
        Recipe.model_validate(RECIPE | change)
