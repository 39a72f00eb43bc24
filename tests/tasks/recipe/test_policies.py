"""The graph of policies: training order, names, and faults that are refused."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo_core.errors import RecipeError
from tasks.recipe.read import load_recipe
from tasks.recipe.recipe import Recipe

DPO: dict[str, Any] = {"method": "dpo"}
PPO: dict[str, Any] = {"method": "ppo"}


def read(folder: Path, *overrides: str, **sections: Any) -> Recipe:
    """The recipe with these sections."""
    recipe = {"name": "mine", "data": {"path": "rows.jsonl"}, "reward": {"source": "sentiment"}} | sections
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return load_recipe(str(path), overrides)


def refusal(folder: Path, **sections: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        read(folder, **sections)
    return str(caught.value)


def test_each_policy_is_trained_after_those_that_it_needs(tmp_path: Path) -> None:
    recipe = read(
        tmp_path,
        policies={
            "Last": DPO | {"start": "Chained", "reference": "First"},
            "Alone": DPO,
            "Chained": {"method": "grpo", "start": "First", "reference": "models:/other@champion"},
            "First": DPO,
        },
    )
    assert [node.policy for node in recipe.nodes()] == ["First", "Chained", "Last", "Alone"]
    last = recipe.nodes()[2]
    assert last.needs == [("Chained", 0), ("First", 0)]
    assert recipe.nodes()[1].needs == [("First", 0)], "models from elsewhere are no nodes"
    assert recipe.candidate_name == "Last", "the first that the recipe lists"
    assert recipe.policies["First"].models == ("SFT", "SFT")


def test_the_candidate_is_the_policy_that_the_recipe_names(tmp_path: Path) -> None:
    policies = {"DPO": DPO, "RLOO": {"method": "grpo", "variant": "rloo", "engine": {"precision": "fp32"}}}
    recipe = read(tmp_path, policies=policies, candidate="RLOO")
    assert (recipe.candidate_name, recipe.precision) == ("RLOO", "fp32")
    assert "there is no policy 'KTO'; there are DPO, RLOO" in refusal(
        tmp_path, policies=policies, candidate="KTO"
    )


@pytest.mark.parametrize(
    ("policies", "words"),
    [
        ({"A": DPO | {"start": "B"}, "B": DPO | {"reference": "A"}}, "trained first: A → B → A"),
        ({"A": DPO | {"start": "A"}}, "trained first: A → A"),
        ({"X": DPO | {"start": "A"}, "A": DPO | {"start": "B"}, "B": DPO | {"start": "A"}}, ": A → B → A"),
        ({"Guide": DPO, "B": DPO | {"reference": "Giude"}},
         "policies.B.reference: there is no policy 'Giude' (did you mean Guide?)"),
        ({"A": DPO | {"start": "sft"}}, "(did you mean SFT?)"),
        ({"A": DPO | {"start": "zzzzz"}}, "there are SFT, A"),
        ({"A": DPO | {"start": "champion"}}, "is models:/NAME@champion"),
    ],
)  # fmt: skip
def test_a_graph_that_cannot_be_trained_is_refused(tmp_path: Path, policies: Any, words: str) -> None:
    assert words in refusal(tmp_path, policies=policies)


@pytest.mark.parametrize(
    ("policies", "words"),
    [
        ({"DPO": DPO, "dpo": DPO}, "'dpo' cannot name a policy: 'DPO' and 'dpo' differ only in case"),
        ({"a,b": DPO, "a+b": DPO}, "would share metric names"),
        ({"sft": DPO}, "'SFT' is the name of a model that every run has"),
        ({"Champion": DPO}, "'Champion' is the name of a model that every run has"),
        *(({name: DPO}, f"'{name}' cannot name a policy: use 1 to 40 letters")
          for name in ("a/b", "a.b", "a=b", "a:b", " a", "a ", "", "a\tb", "it's", "a[b]", "<b>", "x" * 41)),
        ({1: DPO}, "policies.1: names are texts; write 1 in quotes"),
        ({True: DPO}, "names are texts"),
        ({None: DPO}, "names are texts"),
    ],
)  # fmt: skip
def test_a_name_that_tables_or_metrics_could_not_hold_is_refused(
    tmp_path: Path, policies: Any, words: str
) -> None:
    assert words in refusal(tmp_path, policies=policies)


@pytest.mark.parametrize("name", ["DPO, few", "+ EMA reference", "f-DPO", "DPO (β 2)", "偏好", "x" * 40])
def test_other_names_are_free(tmp_path: Path, name: str) -> None:
    recipe = read(tmp_path, f"policies.{name}.epochs=2", policies={name: DPO, "B": DPO | {"start": name}})
    assert recipe.policies[name].settings.epochs == 2
    assert [node.policy for node in recipe.nodes()] == [name, "B"]


def test_a_name_written_twice_is_refused_with_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text("name: mine\npolicies:\n  A: {method: dpo}\n  A: {method: ppo}\ndata: {path: x.jsonl}\n")
    with pytest.raises(RecipeError, match="the key A is on line 3 and again on line 4"):
        load_recipe(str(path))


@pytest.mark.parametrize(
    ("policies", "words"),
    [
        ({"A": {}}, "policy A names no method: set policies.A.method to one of diffusion, dpo, grpo, kto"),
        ({"A": None}, "policy A names no method"),
        ({"A": {"method": "ppp"}}, "there is no method 'ppp' (did you mean ppo?)"),
        ({"A": {"method": "sft"}}, "method sft trains no policy; choose one of diffusion, dpo"),
        ({"A": [1]}, "policies.A: Input should be a valid dictionary"),
        ({}, "at least 1 item"),
        ([DPO], "policies: Input should be a valid dictionary"),
        ({"A": DPO | {"optim": {"lr": 1}}}, "policies.A.optim.lr (did you mean policies.A."),
        ({"A": DPO | {"objective": "dpoo"}}, "policy A: there is no objective 'dpoo'"),
        ({"A": DPO | {"epochs": 0}, "B": PPO | {"lam": 2}}, "policies.B.lam: Input should be less"),
    ],
)
def test_what_a_policy_says_wrongly_is_named_with_its_field(
    tmp_path: Path, policies: Any, words: str
) -> None:
    assert words in refusal(tmp_path, policies=policies)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"policies": {"A": DPO, "B": DPO | {"objective": "simpo", "reference": "A"}}},
         "policies.B.reference has no effect, because the objective 'simpo' has no reference"),
        ({"policies": {"A": DPO | {"reward": "model"}}},
         "policies.A.reward has no effect, because method dpo learns from labelled data"),
        ({"policies": {"A": PPO | {"reward": "source"}}, "reward": {}},
         "policies.A.reward is source, but reward.source is not set"),
        ({"policies": {"A": DPO}, "study": {}, "candidate": "A"}, "candidate has no effect"),
        ({"policies": {"A": PPO}, "reward": {"source": "sentiment", "model": {"epochs": 3}}},
         "reward.model has no effect"),
    ],
)  # fmt: skip
def test_a_field_without_effect_is_refused(tmp_path: Path, sections: Any, words: str) -> None:
    assert words in refusal(tmp_path, **sections)


@pytest.mark.parametrize(
    ("study", "words"),
    [
        ({"grid": {"C": {"epochs": [1]}}}, "study.grid: there is no policy 'C'; there are Guide, A"),
        ({"hidden": ["C"]}, "study.hidden: there is no policy 'C'"),
        ({"grid": {"A": {"epoch": [1]}}}, "study.grid.A, point epoch=1: epoch: Extra inputs"),
        ({"grid": {"A": {"parameters.betta": [1.0]}}}, "does not read the parameter 'betta'"),
        ({"grid": {"A": {"epochs.few": [1]}}}, "epochs.few: epochs is a single value and has no fields"),
        ({"grid": {"A": {"epochs": []}}}, "grid.A has no point"),
        ({"grid": {"A": []}}, "grid.A has no point"),
        ({"grid": {"A": {"epochs": [1, 1]}}}, "grid.A has a point twice"),
        *(({"grid": {"A": {field: ["SFT"]}}}, f"{field} cannot vary; define a policy for each value")
          for field in ("method", "start", "reference", "reward")),
        ({"grid": {"A": {"objective": ["dpo", "simpo"]}}}, "=simpo: policies.A.reference has no effect"),
        ({"grid": {"Guide": {"epochs": [1, 2]}}}, "policy A needs Guide, which study.grid gives 2 points"),
        ({"seeds": [1, 1]}, "a seed is listed twice"),
        ({"seeds": [-1]}, "study.seeds.0: Input should be greater than or equal to 0"),
        ({"seeds": [True]}, "study.seeds.0: Input should be a valid integer"),
        ({"best_of": [0]}, "study.best_of.0: Input should be greater than or equal to 1"),
        ({"kl_at": [-1.0]}, "study.kl_at.0: Input should be greater than 0"),
        ({"grid": {"A": {"epochs": [1, 1.0]}}}, "two points are the same training: epochs=1.0"),
        ({"grid": {"A": {"optim.learning_rate": [1e-4, 2e-4], "optim": [{}]}}},
         "grid.A: optim would overwrite optim.learning_rate"),
    ],
)  # fmt: skip
def test_a_study_that_cannot_be_trained_is_refused(tmp_path: Path, study: Any, words: str) -> None:
    policies = {"Guide": DPO, "A": DPO | {"reference": "Guide"}}
    assert words in refusal(tmp_path, policies=policies, study=study)


def test_a_study_trains_every_point_with_every_seed_and_a_chain_with_its_own(tmp_path: Path) -> None:
    recipe = read(
        tmp_path,
        policies={"A": DPO | {"reference": "Guide"}, "Guide": DPO, "P": PPO},
        study={
            "seeds": [3, 7],
            "grid": {
                "A": [{"parameters.beta": [0.1, 0.2]}, {"parameters.beta": [0.5], "max_steps": [4]}],
                "P": {"kl_coef": [0.1, 0.2], "optim.learning_rate": [1e-4]},
            },
        },
    )
    nodes = recipe.nodes()
    assert [(n.policy, n.point) for n in nodes if n.seed == 3] == [
        ("Guide", ""),
        ("A", "beta=0.1"), ("A", "beta=0.2"), ("A", "beta=0.5, max_steps=4"),
        ("P", "kl_coef=0.1, learning_rate=0.0001"), ("P", "kl_coef=0.2, learning_rate=0.0001"),
    ]  # fmt: skip
    assert [n.seed for n in nodes] == [3] * 6 + [7] * 6, "a stopped study compares them all"
    assert nodes[-3].needs == [("Guide", 7)]
    assert nodes[3].config.settings.max_steps == 4
    assert nodes[3].label == " A beta=0.5, max_steps=4 seed 3"
    assert len({node.config.entry.stage + node.label for node in nodes}) == len(nodes)


def test_a_point_may_set_what_is_empty_by_default_and_another_objective_has_its_own_defaults(
    tmp_path: Path,
) -> None:
    grid = {"A": [{"lora.rank": [4]}, {"objective": ["dpo", "simpo"]}]}
    lora, plain, simpo = read(tmp_path, policies={"A": DPO}, study={"seeds": [0], "grid": grid}).nodes()
    assert lora.config.settings.lora.rank == 4
    assert plain.config.settings.terms[0].parameters["beta"] == 0.1
    assert simpo.config.settings.terms[0].parameters["beta"] == 2.0


def test_an_override_changes_one_policy_or_takes_it_out(tmp_path: Path) -> None:
    policies = {"A": DPO, "B": DPO, "P": PPO}
    recipe = read(tmp_path, "policies.B.parameters.beta=0.3", "policies.P=null", policies=policies)
    assert list(recipe.policies) == ["A", "B"]
    assert [p.settings.terms[0].parameters["beta"] for p in recipe.policies.values()] == [0.1, 0.3]
    with pytest.raises(RecipeError, match="there is no policy 'Q'"):
        read(tmp_path, "policies.Q=null", policies=policies)
