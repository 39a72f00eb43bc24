"""What a recipe is refused for before anything runs."""

import sys

import pytest

from dpo_core.errors import RecipeError
from tasks.recipe import load_recipe


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_lora_without_its_package_is_refused_when_the_recipe_is_read(name, monkeypatch):
    asked = [f"{name}.lora.rank=8"]
    assert getattr(load_recipe("demo", asked), name).lora.rank == 8
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(RecipeError, match=f"{name}.lora needs peft") as caught:
        load_recipe("demo", asked)
    assert ".[lora]" in str(caught.value)
    load_recipe("demo")
