"""Policies of a run by their names, and settings of online methods that would not be read."""

import inspect
from pathlib import Path
from typing import get_args

import pytest

from dpo_core.errors import RecipeError
from flows.cli.evaluate import evaluate
from tasks.recipe.read import load_recipe
from tasks.reports.run_report import PolicyRow
from tasks.runs.record import new_run, save_run
from tasks.stages.standalone_evaluation import EvaluationRequest, evaluate_models
from tasks.stages.suite_results import find_model
from tests.support.runs.tiny_run import Bench


def test_a_policy_is_found_by_its_name_and_never_by_another(graph) -> None:
    bench, report, _ = graph
    run = report["run"]["name"]
    made = {stage["name"]: Path(stage["uri"].removeprefix("file://")) for stage in report["stages"]}
    stages = {
        "": "train-grpo GRPO",
        ":sft": "prepare-sft",
        ":dpo": "train-dpo DPO",
        ":ppo": "train-ppo PPO",
        ":PPO": "train-ppo PPO",
        ":grpo": "train-grpo GRPO",
        ":pre-dpo": "train-dpo Pre-DPO",
        ":online-dpo": "train-online_dpo Online DPO",
    }
    assert {name: find_model(run + name, bench.workspace) for name in stages} == {
        name: made[stage] for name, stage in stages.items()
    }
    for name in (":rloo", ":kto", ":nonsense", ":train-ppo", ":"):
        with pytest.raises(RecipeError, match=r"has no policy .* Its policies: .*GRPO, Online DPO, DPO, PPO"):
            find_model(run + name, bench.workspace)
    (bench.folder / "hhh_alignment.jsonl").touch()
    asked = EvaluationRequest(suites=["hhh"], data=str(bench.folder))
    with pytest.raises(RecipeError, match=f"{run} and {run}:grpo are the same model"):
        evaluate_models([run, f"{run}:grpo"], asked, bench.workspace)


def test_a_run_that_is_not_finished_is_no_model(tmp_path: Path) -> None:
    record = new_run(tmp_path, "tiny", "dpo run tiny")
    save_run(tmp_path, record)
    with pytest.raises(RecipeError, match="is not finished: its status is running"):
        find_model(f"{record.run_id}:ppo", tmp_path)


def test_the_help_names_the_policies() -> None:
    told = " ".join(inspect.unwrap(evaluate).__annotations__["model"].__metadata__[0].help.split())
    assert all(name in told for name in get_args(PolicyRow.model_fields["name"].annotation)[:-1])


def test_settings_that_would_not_be_read_are_refused_with_the_recipe(bench: Bench) -> None:
    with pytest.raises(RecipeError, match="missing_eos has no effect, because missing_eos_penalty"):
        load_recipe(str(bench.recipe), ["policies.PPO.missing_eos=replace"])
