"""Commented YAML gives the configuration that it was written from when it is read back."""

import pytest
import yaml
from pydantic import ValidationError

from deploy.launchers.registry import TARGETS
from dpo_core.yaml import commented, form
from tasks.recipe.read import load_recipe, shipped_recipes
from tasks.recipe.recipe import Recipe


@pytest.mark.parametrize("name", shipped_recipes())
def test_an_explained_recipe_is_the_recipe(name: str) -> None:
    recipe = load_recipe(name, [])
    assert Recipe.model_validate(yaml.safe_load(commented(recipe))) == recipe


def test_every_field_is_explained_above_it() -> None:
    lines = commented(load_recipe("demo", ["description='a: b # c'"])).splitlines()
    is_comment = [line.lstrip().startswith("#") for line in lines]
    assert not [line for place, line in enumerate(lines) if not (is_comment[place] or is_comment[place - 1])]
    assert "description: 'a: b # c'" in lines
    assert max(len(line) for line, comment in zip(lines, is_comment, strict=True) if comment) <= 102


@pytest.mark.parametrize("on", TARGETS)
def test_a_form_marks_required_fields(on: str) -> None:
    kind, _ = TARGETS[on]
    blank = yaml.safe_load(form(kind))
    required = {name for name, field in kind.model_fields.items() if field.is_required()}
    assert {line.split(":")[0] for line in form(kind).splitlines() if line.endswith("# required")} == required
    if required:
        with pytest.raises(ValidationError):
            kind.model_validate(blank)
    filled = blank | dict.fromkeys(required, "/x")
    assert kind.model_validate(filled) == kind.model_validate(dict.fromkeys(required, "/x"))
