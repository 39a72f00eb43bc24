"""What a recipe is refused for before anything runs."""

import sys

import pytest

from dpo_core.errors import RecipeError
from tasks.recipe.read import load_recipe


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_lora_without_its_package_is_refused_when_the_recipe_is_read(name, monkeypatch):
    asked = [f"{name}.lora.rank=8"]
    assert getattr(load_recipe("demo", asked), name).lora.rank == 8
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(RecipeError, match=f"{name}.lora needs peft") as caught:
        load_recipe("demo", asked)
    assert ".[lora]" in str(caught.value)
    load_recipe("demo")


def test_an_override_changes_one_place_where_an_alias_stands_in_many(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "name: mine\ndata: {path: rows.jsonl}\n"
        "sft: {engine: &shared {precision: fp32}}\ndpo: {engine: *shared}\nppo: {engine: *shared}\n"
    )
    read = load_recipe(str(recipe), ["dpo.engine.precision=bf16", "dpo.engine.save_every=7"])
    assert [read.sft.engine.precision, read.dpo.engine.precision, read.ppo.engine.precision] == [
        "fp32", "bf16", "fp32",
    ]  # fmt: skip
    assert read.dpo.engine.save_every == 7 != read.sft.engine.save_every
