"""What the first stages ask of the data, without the stages."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dpo_core.errors import RecipeError
from flows.preparation import _require_answers, _require_labels
from tasks.recipe.recipe import Recipe
from tests.scenarios.bad_inputs import SIZES, World

LEARNED = {"source": None, "model": {"margin": "agreement"}}
KTO = {"DPO": None, "KTO": {"method": "kto", **SIZES}}


def recipe(changes: dict[str, Any]) -> Recipe:
    return Recipe.model_validate(World(Path("/w"), Path("/m")).recipe_of(**changes))


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("unpaired", {"policies": KTO, "reward": {"source": None}}, "without reward.source a reward model"),
        (
            "unpaired",
            {"policies": KTO | {"PPO": {"method": "ppo", "reward": "model"}}},
            "policies.PPO.reward is a model, which is trained on pairs. Remove policies.PPO.reward",
        ),
        ("prompts", {"reward": None}, "prompts without pairs, but there is no reward"),
        ("prompts", {"sft": {"enabled": True}}, "no chosen answers for SFT"),
        (
            "prompts",
            {
                "reward": {"model": {"margin": "agreement"}},
                "policies": {"PPO": {"method": "ppo", "reward": "model"}},
            },
            "reward.model.margin is agreement, but no training pair has a value",
        ),
    ],
)
def test_data_of_a_kind_that_the_recipe_cannot_learn_from(
    kind: str, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(RecipeError) as refused:
        _require_labels(recipe(changes), kind)
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("facts", "changes", "words"),
    [
        ({"held_out_prompts": 1}, {}, "one held-out prompt with one sample gives no confidence interval"),
        ({"with_agreement": 0}, {"reward": LEARNED}, "margin is agreement, but no training pair has a value"),
        (
            {"desirable": 0},
            {"policies": KTO, "sft": {"enabled": True}},
            "no training row is labelled desirable, but SFT learns from desirable answers",
        ),
    ],
)
def test_rows_that_would_fail_only_later(facts: dict[str, int], changes: dict[str, Any], words: str) -> None:
    judged: Any = SimpleNamespace(extra=facts)
    with pytest.raises(RecipeError) as refused:
        _require_answers(recipe(changes), judged)
    assert words in str(refused.value)
