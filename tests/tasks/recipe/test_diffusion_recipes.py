"""Recipes of diffusion models: what they need, and what cannot work is refused with its remedy."""

from typing import Any

import pytest

from dpo_core.errors import RecipeError
from dpo_core.models.config import ModelConfig
from tasks.preflight import require_kind
from tasks.recipe.read import load_recipe
from tasks.recipe.recipe import Recipe
from tasks.reports.about import describe_policies
from tests.support.models.tiny import make_tiny_model
from tests.support.models.tiny_diffusion import make_tiny_diffusion

RECIPE: dict[str, Any] = {
    "name": "images",
    "model": {"denoiser": {}},
    "data": {"solid_scenes": True},
    "reward": {"source": "scenes:graded"},
    "policies": {"DPO": {"method": "diffusion"}},
}


def test_the_shipped_recipe_says_what_its_policies_learn() -> None:
    recipe = load_recipe("scenes-diffusion")
    assert recipe.diffusion
    assert not recipe.fine_tunes
    assert recipe.unusual_parameters == [], "the scale of rewards is kappa, and beta 1 is usual"
    about = {name: policy.words for name, policy in describe_policies(recipe).items()}
    assert about["DPO"] == "dpo; kappa 3"
    assert about["kl_plus"] == "kl_plus, c 0.5; kappa 3"
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe


def test_recipes_of_language_models_are_written_as_before() -> None:
    written = load_recipe("demo").model_dump(mode="json")
    assert "diffusion_sft" not in written
    assert "denoiser" not in written["model"]
    assert "solid_scenes" not in written["data"]
    assert "denoising_steps" not in written["evaluate"]["sampling"]
    assert "pairs_per_prompt" not in written["pairs"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"policies": RECIPE["policies"] | {"B": {"method": "dpo"}}}, "Make two recipes"),
        ({"policies": {"B": {"method": "dpo"}}}, "model.denoiser has no effect"),
        ({"policies": {"A": {"method": "diffusion_sft"}}}, "trains no policy"),
        ({"policies": {"A": {"method": "diffusion", "objective": "tdpo2"}}}, "reads tokens"),
        ({"policies": {"A": {"method": "diffusion", "reward": "model"}}}, "learns from labelled data"),
        ({"reward": {}}, "reward.source is needed"),
        ({"sft": {"made_demonstrations": 8}}, "Use diffusion_sft"),
        ({"diffusion_sft": {}}, "set captions .* or made_scenes"),
        ({"diffusion_sft": {"captions": "a", "made_scenes": 8}}, "set captions .* or made_scenes"),
        ({"tokens": {"max_length": 600}}, "tokens cannot be used"),
        ({"study": {"seeds": [0, 1]}}, "dpo compare"),
        ({"judge": {"kind": "llm", "endpoint": {"base_url": "http://h", "model": "m"}}}, "suites compare"),
        ({"promotion": {"max_kl": 3.0}}, "promotion.max_kl cannot be used"),
        (
            {"suites": {"names": ["scenes"]}},
            "scenes is of language models.*run scenes_solid",
        ),
        ({"pairs": {"sampling": {"temperature": 0.5}}}, "pairs.sampling.temperature has no effect"),
        ({"evaluate": {"sampling": {"max_new_tokens": 64}}}, "evaluate.sampling.max_new_tokens has no"),
        ({"evaluate": {"pairs": 8}}, "evaluate.pairs has no effect"),
        ({"model": {"denoiser": {}, "scratch": {}}}, "scratch has no effect"),
        ({"data": {"solid_scenes": True, "seed": 1}}, "data.seed has no effect"),
        ({"data": {"solid_scenes": True, "scenes": 2}}, "two are set"),
        ({"pairs": {"pairs_per_prompt": 2}}, "Set pairing to extremes"),
    ],
)
def test_what_cannot_work_is_refused(change: dict[str, Any], told: str) -> None:
    Recipe.model_validate(RECIPE)
    with pytest.raises((ValueError, RecipeError), match=told):
        Recipe.model_validate(RECIPE | change)


def test_steps_of_denoising_are_refused_in_a_recipe_of_text() -> None:
    text = {
        "name": "t",
        "data": {"openings": 8},
        "sft": {"enabled": False},
        "reward": {"source": "sentiment"},
    }
    change = {"evaluate": {"sampling": {"denoising_steps": 4}}}
    with pytest.raises(ValueError, match="denoising_steps has no effect on a language model"):
        Recipe.model_validate(text | change)


def test_a_model_of_the_other_kind_is_refused_before_the_run(tmp_path) -> None:
    denoiser = make_tiny_diffusion(tmp_path / "images", "pixels")
    text = make_tiny_model(tmp_path / "text")
    require_kind(denoiser, diffusion=True)
    require_kind(text, diffusion=False)
    with pytest.raises(RecipeError, match="is none") as error:
        require_kind(text, diffusion=True)
    assert "model.denoiser" in error.value.remedy
    with pytest.raises(RecipeError, match="is a diffusion model, and the policies train a language model"):
        require_kind(denoiser, diffusion=False)
    assert ModelConfig(name=str(denoiser)).denoiser is None
