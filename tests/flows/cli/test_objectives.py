"""`dpo objectives`: what a person and what a script gets to see."""

import json

import pytest
import yaml
from typer.testing import CliRunner

from dpo_core.errors import RecipeError
from dpo_core.methods.dpo import DpoConfig, ReferenceSync
from dpo_core.objectives import VARIANTS, get, names
from flows.cli.main import app
from tasks.recipe.recipe import Recipe

MADE = [variant.name for variant in VARIANTS]


def shown(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["objectives", *arguments])
    assert result.exit_code == 0
    return result.stdout


def test_the_list_says_what_each_is_and_needs() -> None:
    lines = shown().splitlines()
    heads = [line for line in lines if "  (" in line and not line.startswith(" ")]
    assert [head.split()[0] for head in heads] == [*names(), *MADE]
    assert "tdpo2  (pairs, live reference)" in heads
    assert "aot  (pairs, reference, whole batch)" in heads
    assert "kto  (unpaired, reference)" in heads
    assert "tr_dpo  (pairs, live reference)" in heads
    place = lines.index("simpo  (pairs)")
    assert lines[place + 1].startswith("  -log σ(beta·(log π(y_w)/n_w - log π(y_l)/n_l - gamma_beta_ratio))")
    assert "arXiv 2405.14734" in lines[place + 2]
    assert lines[place + 5].startswith("  gamma_beta_ratio = 0.5 in [0, 5]: ")


def test_one_is_shown_with_its_whole_definition() -> None:
    text = shown("ld_dpo", "wpo")
    assert "LLaMA-Factory and ms-swift weigh the policy only" in text
    assert "weighting: wpo" in text
    assert "simpo" not in text
    result = CliRunner().invoke(app, ["objectives", "dop"])
    assert "there is no objective 'dop'" in str(result.exception)


def test_json_has_everything() -> None:
    text = shown("--json")
    assert "Infinity" not in text, "which is no JSON"
    facts = {fact["name"]: fact for fact in json.loads(text)}
    assert list(facts) == [*names(), *MADE]
    assert facts["tdpo1"]["needs_full_vocabulary"]
    assert facts["tdpo1"]["extras"] == ["kl"]
    assert facts["aot"]["batch_coupled"]
    assert facts["hinge"]["value_at_reference"] == 1.0
    assert facts["sft"]["value_at_reference"] is None
    assert facts["dpo"]["parameters"]["beta"]["default"] == get("dpo").parameters["beta"].default
    for fact in facts.values():
        assert fact["citation"]
        assert fact["definition"]
        assert fact["needs"]
        assert fact["setting"].startswith("policies: {")
    assert [fact["name"] for fact in json.loads(shown("cpo", "--json"))] == ["cpo"]


@pytest.mark.parametrize("variant", VARIANTS, ids=MADE)
def test_the_settings_of_a_variant_are_those_of_the_recipe(variant) -> None:
    written = yaml.safe_load(variant.setting)
    recipe = Recipe.model_validate({"name": "made", "data": {"path": "pairs.jsonl"}} | written)
    config = list(recipe.policies.values())[-1].settings
    assert config.needs_live_reference is ("live reference" in variant.needs)
    if config.reference_sync:
        defaults = {f"reference_sync.{name}": value for name, value in ReferenceSync().model_dump().items()}
        assert {name: p.default for name, p in variant.parameters.items()} == defaults
        assert config.reference_sync == ReferenceSync()


def test_a_variant_taken_for_an_objective_is_explained() -> None:
    with pytest.raises(
        RecipeError, match=r"made of settings; write policies: \{WPO: \{method: dpo, weighting: wpo\}\}"
    ):
        DpoConfig(objective="wpo")
