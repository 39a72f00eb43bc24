"""Defaults of partly given sections of settings, and the descriptions of fields."""

import pytest
from pydantic import Field

from dpo_core.config import Config
from dpo_core.methods.registry import methods
from tasks.recipe.policies import CLASSES
from tasks.recipe.recipe import Recipe

GIVEN = {"optim": {"schedule": "cosine"}, "engine": {"precision": "fp32"}}


@pytest.mark.parametrize("name", methods())
def test_a_partly_given_section_keeps_the_other_defaults_of_the_method(name: str) -> None:
    kind = methods()[name].settings
    plain, changed = kind(), kind(**GIVEN)
    assert changed.optim == plain.optim.model_copy(update=GIVEN["optim"])
    assert changed.engine == plain.engine.model_copy(update=GIVEN["engine"])


def test_so_it_is_in_a_policy_and_in_the_sections_of_a_recipe() -> None:
    optim = {"schedule": "constant"}
    recipe = Recipe.model_validate(
        {
            "name": "a",
            "data": {"path": "rows.jsonl"},
            "policies": {"PPO": {"method": "ppo", "optim": optim, "critic_optim": optim}},
            "sft": {"optim": optim},
            "reward": {"model": {"optim": optim}},
        }
    )
    ppo = recipe.policies["PPO"].settings
    for part in (ppo.optim, ppo.critic_optim):
        assert (part.learning_rate, part.epsilon, part.warmup_fraction) == (1e-5, 1e-5, 0.0)
    assert recipe.sft.optim.learning_rate == recipe.reward.model.optim.learning_rate == 2e-5
    assert CLASSES["dpo"](method="dpo", optim=optim).settings.optim.learning_rate == 1e-5


class Described(Config):
    """A class with fields described in each way."""

    below: int = 1
    """The string
    below the field."""
    inside: int = Field(2, description="Given to the field.")
    """Not this one."""
    bare: int = 3


class Inherits(Described):
    """Keeps what it inherits."""

    more: int = 4
    """Its own."""


def test_a_field_is_described_by_the_string_below_it():
    def described(kind):
        return {name: field.description for name, field in kind.model_fields.items()}

    own = {"below": "The string\nbelow the field.", "inside": "Given to the field.", "bare": None}
    assert described(Described) == own
    assert described(Inherits) == {**own, "more": "Its own."}
    shown = Inherits.model_json_schema()["properties"]
    assert shown["below"]["description"] == own["below"]
    assert shown["more"]["description"] == "Its own."
