"""Checks that refuse a recipe before anything runs."""

import sys

import pytest

from dpo_core.errors import RecipeError
from tasks.recipe.read import load_recipe


@pytest.mark.parametrize("name", ["sft", "policies.DPO"])
def test_lora_without_its_package_is_refused_when_the_recipe_is_read(name, monkeypatch):
    overrides = [f"{name}.lora.rank=8"]
    read = load_recipe("demo", overrides)
    assert (read.sft if name == "sft" else read.policies["DPO"]).lora.rank == 8
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(RecipeError, match=f"{name}.lora needs peft") as caught:
        load_recipe("demo", overrides)
    assert ".[lora]" in str(caught.value)
    load_recipe("demo")


def test_an_override_changes_one_place_where_an_alias_stands_in_many(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "name: mine\ndata: {path: rows.jsonl}\n"
        "sft: {engine: &shared {precision: fp32}}\n"
        "policies: {A: {method: dpo, engine: *shared}, B: {method: ppo, engine: *shared}}\n"
    )
    changes = ["policies.A.engine.precision=bf16", "policies.A.engine.save_every=7"]
    read = load_recipe(str(recipe), changes)
    a, b = (policy.settings.engine for policy in read.policies.values())
    assert [read.sft.engine.precision, a.precision, b.precision] == ["fp32", "bf16", "fp32"]
    assert a.save_every == 7 != read.sft.engine.save_every
