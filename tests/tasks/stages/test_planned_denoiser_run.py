"""The work of a run of a diffusion model, by hand."""

from typing import Any

import pandas as pd

from dpo_core.images.solid import prompts
from tasks.recipe.recipe import Recipe
from tasks.stages.planned_denoiser_run import PlannedDenoiserRun

RECIPE: dict[str, Any] = {
    "name": "scenes",
    "model": {"denoiser": {}},
    "data": {"solid_scenes": True},
    "diffusion_sft": {"made_scenes": 10},
    "pairs": {"samples_per_prompt": 6, "pairing": "extremes", "pairs_per_prompt": 2},
    "reward": {"source": "scenes:graded"},
    "policies": {"A": {"method": "diffusion"}},
    "evaluate": {"prompts": 2, "samples_per_prompt": 3, "sampling": {"guidance": 2.0}},
}


def test_images_are_counted_by_prompts_samples_steps_and_guidance() -> None:
    recipe = Recipe.model_validate(RECIPE)
    names = [record.prompt for record in prompts(held_out=False)[:4]]
    frame = pd.DataFrame(
        {"prompt": [*names, names[0]], "chat": "", "split": ["train", "train", "train", "eval", "eval"]}
    )
    run = PlannedDenoiserRun(
        recipe,
        None,
        "",
        None,
        "prompts",
        frame,
        image_flops=10.0,
        captioned=10,  # type: ignore[arg-type]
    )
    pairs = recipe.pairs
    assert run.sampling_work(None, pairs.sampling, 6).flops == 5 * 6 * 20 * 10
    assert run.evaluation_work(3).flops == 3 * 2 * 3 * 2 * 20 * 10, "guidance takes two passes"
    assert run.examples("demonstrations").count == 10
    assert run.examples("pairs").count == 3 * 2, "those of the training prompts"
    assert run.examples("pairs", limit=4).count == 4
