"""Recipes of the form before `policies`: the replacement that the error shows is equivalent."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo_core.errors import RecipeError
from tasks.recipe.read import load_recipe
from tasks.recipe.recipe import Recipe

PLAIN = {"name": "old", "data": {"path": "rows.jsonl"}, "reward": {"source": "sentiment"}}
ROUNDS = {"iterations": 2, "episodes": 8, "micro_batch_size": 4}


def put_in_place(folder: Path, **old: Any) -> Recipe:
    """The recipe that the refusal of the old one tells to write."""
    path = folder / "old.yaml"
    path.write_text(yaml.safe_dump(PLAIN | old, sort_keys=False))
    with pytest.raises(RecipeError, match="became part of `policies`") as caught:
        load_recipe(str(path))
    fields = {k: v for k, v in PLAIN.items() if k != "reward"} | {"reward": {"source": "sentiment"}}
    shown = caught.value.remedy.partition("\n\n")[2]
    path.write_text(yaml.safe_dump(fields) + shown)
    return load_recipe(str(path))


def settings(recipe: Recipe) -> dict[str, dict[str, Any]]:
    return {name: policy.settings.model_dump() for name, policy in recipe.policies.items()}


def test_dpo_and_ppo(tmp_path: Path) -> None:
    dpo = {"objective": "simpo", "parameters": {"beta": 2.5}, "optim": {"learning_rate": 3e-5}}
    recipe = put_in_place(tmp_path, dpo=dpo, ppo={**ROUNDS, "enabled": True, "kl_coef": 0.1})
    assert recipe.candidate_name == "DPO"
    policies = settings(recipe)
    assert list(policies) == ["DPO", "PPO"]
    assert policies["DPO"]["parameters"]["beta"] == 2.5
    assert (policies["DPO"]["objective"], policies["DPO"]["optim"]["learning_rate"]) == ("simpo", 3e-5)
    assert (policies["PPO"]["kl_coef"], policies["PPO"]["iterations"]) == (0.1, 2)


def test_ppo_was_there_unless_it_was_switched_off(tmp_path: Path) -> None:
    assert list(put_in_place(tmp_path, dpo={"epochs": 2}).policies) == ["DPO", "PPO"]
    recipe = put_in_place(tmp_path, dpo={"epochs": 2}, ppo={"enabled": False})
    assert list(recipe.policies) == ["DPO"]
    assert recipe.policies["DPO"].settings.epochs == 2


def test_a_guide_becomes_the_reference(tmp_path: Path) -> None:
    recipe = put_in_place(tmp_path, guide={"max_steps": 3}, dpo={"max_steps": 5}, ppo={"enabled": False})
    assert [n.policy for n in recipe.nodes()] == ["Guide", "DPO"]
    assert recipe.candidate_name == "DPO"
    assert recipe.policies["DPO"].models == ("SFT", "Guide")
    assert recipe.policies["Guide"].models == ("SFT", "SFT")
    assert [settings(recipe)[name]["max_steps"] for name in ("Guide", "DPO")] == [3, 5]


def test_objectives_on_single_answers_are_a_method(tmp_path: Path) -> None:
    dpo = {"objective": "bco", "parameters": {"beta": 0.2}}
    policy = put_in_place(tmp_path, dpo=dpo, ppo={"enabled": False}).policies["DPO"]
    assert (policy.method, policy.settings.objective) == ("kto", "bco")
    assert policy.settings.parameters["beta"] == 0.2


@pytest.mark.parametrize(
    ("variant", "name"), [("grpo", "GRPO"), ("dr_grpo", "Dr GRPO"), ("dapo", "DAPO"), ("rloo", "RLOO")]
)
def test_grpo_is_called_by_its_variant(tmp_path: Path, variant: str, name: str) -> None:
    grpo = {"variant": variant, "group_size": 4, "iterations": 2, "episodes": 8, "micro_batch_size": 4}
    policies = settings(put_in_place(tmp_path, dpo={}, ppo={"enabled": False}, grpo=grpo))
    assert list(policies) == ["DPO", name]
    assert (policies[name]["variant"], policies[name]["group_size"]) == (variant, 4)


@pytest.mark.parametrize(("reference", "renewed"), [("each_round", True), ("fixed", False)])
def test_online_dpo_renews_its_reference(tmp_path: Path, reference: str, renewed: bool) -> None:
    online = {**ROUNDS, "reference": reference}
    recipe = put_in_place(tmp_path, dpo={}, ppo={"enabled": False}, online=online)
    policy = recipe.policies["Online DPO"]
    assert (policy.method, policy.settings.renew_reference) == ("online_dpo", renewed)
    assert policy.reference == "SFT"


def test_what_all_online_methods_optimised_is_each_policys_reward(tmp_path: Path) -> None:
    recipe = put_in_place(
        tmp_path,
        reward={"source": "sentiment", "optimise": "model"},
        dpo={},
        grpo={"group_size": 4, "episodes": 8, "micro_batch_size": 4},
    )
    assert [p.reward for p in recipe.policies.values()] == [None, "model", "model"]
    alone = put_in_place(tmp_path, reward={"source": "sentiment", "optimise": "model"})
    assert [p.reward for p in alone.policies.values()] == [None, "model"]


def test_arms_of_a_frontier_are_policies_and_their_settings_a_grid(tmp_path: Path) -> None:
    """Every policy, point, seed and setting that the arms meant."""
    arms = [
        {"name": "DPO", "method": "dpo", "settings": [
            {"parameters.beta": 0.1}, {"parameters.beta": 0.5}, {"parameters.beta": 0.5, "max_steps": 4}]},
        {"name": "PPO 1.5", "method": "ppo", "reward": "model", "settings": [{"target_kl": 2.0}]},
        {"name": "SimPO", "method": "dpo", "base": {"objective": "simpo"}, "settings": [{"max_steps": 6}]},
        {"name": "Single", "method": "dpo", "settings": [{"objective": "kto"}, {"objective": "dpo"}]},
        {"name": "GRPO", "method": "grpo", "base": {"optim.learning_rate": 1e-4}, "settings": [{}]},
        {"name": "Pre-DPO", "method": "dpo", "base": {"limit": 8}, "guided": True, "drawn": False,
         "settings": [{"parameters.beta": 0.1}, {"parameters.beta": 0.2}]},
    ]  # fmt: skip
    recipe = put_in_place(
        tmp_path,
        dpo={"max_steps": 9},
        ppo={"iterations": 3},
        grpo={"group_size": 4},
        frontier={"seeds": [1, 2], "kl_at": [1.5], "best_of": [2], "parallel": 2, "arms": arms},
    )
    study = recipe.study
    assert study is not None
    assert (study.seeds, study.kl_at, study.best_of, study.parallel) == ([1, 2], [1.5], [2], 2)
    assert study.hidden == ["Guide of Pre-DPO", "Pre-DPO", "Guide of Pre-DPO 2", "Pre-DPO 2"]
    nodes = {(n.policy, n.point): n.config for n in recipe.nodes() if n.seed == 2}
    assert list(nodes) == [
        ("DPO", "beta=0.1"), ("DPO", "beta=0.5"), ("DPO", "beta=0.5, max_steps=4"),
        ("PPO 1 5", "target_kl=2.0"),
        ("SimPO", "max_steps=6"),
        ("Single", "objective=kto"), ("Single 2", "objective=dpo"),
        ("GRPO", ""),
        ("Guide of Pre-DPO", "beta=0.1"), ("Pre-DPO", "beta=0.1"),
        ("Guide of Pre-DPO 2", "beta=0.2"), ("Pre-DPO 2", "beta=0.2"),
    ]  # fmt: skip
    assert [c.settings.max_steps for key, c in nodes.items() if key[0] == "DPO"] == [9, 9, 4]
    ppo = nodes["PPO 1 5", "target_kl=2.0"]
    assert (ppo.reward, ppo.settings.iterations, ppo.settings.target_kl) == ("model", 3, 2.0)
    assert nodes["SimPO", "max_steps=6"].settings.objective == "simpo"
    assert nodes["Single", "objective=kto"].method == "kto"
    assert (nodes["GRPO", ""].settings.group_size, nodes["GRPO", ""].settings.optim.learning_rate) == (
        4,
        1e-4,
    )
    for number, beta in (("", 0.1), (" 2", 0.2)):
        pre, guide = (nodes[f"{name}Pre-DPO{number}", f"beta={beta}"] for name in ("", "Guide of "))
        assert pre.reference == f"Guide of Pre-DPO{number}"
        assert pre.settings == guide.settings
        assert (pre.settings.limit, pre.settings.parameters["beta"]) == (8, beta)


@pytest.mark.parametrize(
    ("override", "write"),
    [
        ("dpo.parameters.beta=0.05", "Write policies.NAME.parameters.beta"),
        ("ppo.enabled=false", "Write policies.NAME=null to remove a policy"),
        ("grpo={}", "Write policies.NAME"),
        ("online.iterations=3", "Write policies.NAME.iterations"),
        ("guide={objective: dpo}", "Write policies.Guide, and policies.NAME.reference=Guide"),
        ("reward.optimise=model", "Write policies.NAME.reward=model"),
        ("frontier.seeds=[0]", "Write study.seeds"),
    ],
)
def test_an_override_of_an_old_section_names_the_new_one(override: str, write: str) -> None:
    with pytest.raises(RecipeError, match=r"any more; policies are DPO, PPO") as caught:
        load_recipe("demo", [override])
    assert write in str(caught.value)


def test_old_sections_beside_policies_are_not_merged(tmp_path: Path) -> None:
    path = tmp_path / "both.yaml"
    path.write_text(yaml.safe_dump(PLAIN | {"policies": {"A": {"method": "dpo"}}, "dpo": {"epochs": 3}}))
    with pytest.raises(RecipeError, match="Remove them; the recipe already has policies"):
        load_recipe(str(path))
