"""A whole comparison study on a tiny model, through the real command line, Prefect, MLflow and torchrun."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient

from tests.support.runs.tiny_run import ENGINE, Bench

MODEL = {"max_steps": 2, "batch_size": 8, "micro_batch_size": 8, "engine": ENGINE}
ROUNDS = {"iterations": 2, "episodes": 8, "micro_batch_size": 8, "epochs": 1, "engine": ENGINE}
ARMS: list[dict[str, Any]] = [
    {"name": "DPO", "method": "dpo", "settings": [{"parameters.beta": 0.1}, {"parameters.beta": 0.5}]},
    {"name": "PPO", "method": "ppo", "reward": "model", "settings": [{"kl_coef": 0.1}]},
    {"name": "PPO-GT", "method": "ppo", "settings": [{"kl_coef": 0.1}]},
    {"name": "GRPO", "method": "grpo", "base": {**ROUNDS, "group_size": 4}, "settings": [{"kl_coef": 0.1}]},
    {"name": "Pre-DPO, few", "method": "dpo", "base": {"limit": 8}, "guided": True, "drawn": False,
     "settings": [{"parameters.beta": 0.1}]},
]  # fmt: skip


def study_recipe(bench: Bench, name: str = "study", **frontier: Any) -> Path:
    recipe = yaml.safe_load(bench.recipe.read_text())
    recipe |= {"name": name, "frontier": {"seeds": [0, 1], "arms": ARMS, "best_of": [2, 4]} | frontier}
    if any(arm.get("reward") == "model" for arm in recipe["frontier"]["arms"]):
        recipe["reward"]["model"] = MODEL
    path = bench.folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture(scope="module")
def studied(finished: tuple[Bench, dict[str, Any]]) -> tuple[Bench, Path, dict[str, Any]]:
    """A workspace in which a study has run, two policies at a time, after an alignment of the same data."""
    bench = finished[0].copy("study")
    recipe = study_recipe(bench, parallel=2)
    done = bench.dpo("run", str(recipe), "--json", timeout=1500)
    assert done.returncode == 0, done.stderr
    return bench, recipe, json.loads(done.stdout)


def test_every_policy_is_measured_on_the_same_prompts(studied) -> None:
    _, _, report = studied
    study = report["study"]
    points = {(p["arm"], p["setting"], p["seed"]) for p in study["points"]}
    assert len(points) == 2 * sum(len(arm["settings"]) for arm in ARMS) == 12
    assert ("DPO", "beta=0.5", 1) in points
    for point in study["points"]:
        assert len(point["rewards_P"]) == study["prompts"] == 6
        assert point["cost"]["flops"] > 0
        assert point["cost"]["seconds"] > 0
        assert point["cost"]["peak_memory_bytes"] > 0
    assert [b["n"] for b in study["best_of"]] == [2, 4]
    assert study["drawn"] == ["DPO", "PPO", "PPO-GT", "GRPO"]


def test_the_cost_of_a_policy_is_that_of_all_it_needed(studied) -> None:
    _, _, report = studied
    shared = {p["arm"]: set(p["shared_cost"]) for p in report["study"]["points"]}
    assert shared["DPO"] == {"sample-pairs", "cache-reference"}
    assert shared["PPO"] == {"sample-pairs", "train-reward"}, "the reward model learned from the pairs"
    assert shared["PPO-GT"] == set()
    assert shared["Pre-DPO, few"] == {"sample-pairs", "cache-reference", "train-guide", "cache-guide"}
    states = {s["name"]: s["state"] for s in report["stages"]}
    assert states["prepare-sft"] == states["sample-pairs"] == "cached", "the alignment had made them"


def test_the_page_the_picture_and_mlflow_have_it(studied) -> None:
    bench, _, report = studied
    folder = bench.workspace / "runs" / report["run"]["name"]
    assert "Pre-DPO, few" in (folder / "page.html").read_text()
    assert (folder / "frontier.png").stat().st_size > 10_000
    client = MlflowClient(f"sqlite:///{bench.workspace / 'mlflow.db'}")
    parent = client.get_run(report["run"]["mlflow_run_id"])
    assert {"area/dpo", "area/ppo-gt"} <= set(parent.data.metrics)
    names = {a.path for a in client.list_artifacts(parent.info.run_id)}
    assert {"page.html", "frontier.png", "report.json"} <= names
    query = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    children = {r.info.run_name for r in client.search_runs([parent.info.experiment_id], query)}
    assert {"train-ppo PPO kl_coef=0.1 seed 1", "measure GRPO kl_coef=0.1 seed 0"} <= children


def test_a_second_study_runs_nothing_and_says_the_same(studied) -> None:
    bench, recipe, report = studied
    again = json.loads(bench.dpo("run", str(recipe), "--json", timeout=1500).stdout)
    assert {s["state"] for s in again["stages"]} == {"cached"}
    assert again["study"] == report["study"]
    assert again["claims"] == report["claims"]


def test_the_plan_knows_every_policy(studied) -> None:
    bench, recipe, _ = studied
    done = bench.dpo("plan", str(recipe), "--json", "--set", "frontier.seeds=[0, 1, 2]")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["stages"]
    coming = [row for row in rows if row["state"] == "runs"]
    assert all(row["name"].endswith("seed 2") for row in coming)
    trained = [row for row in coming if row["name"].startswith("train-")]
    assert len(trained) == 1 + 7
    assert all(row["flops"] > 0 and row["memory_bytes"] for row in trained)


def test_it_can_be_shown_again(studied) -> None:
    bench, _, report = studied
    done = bench.dpo("show", report["run"]["name"])
    assert done.returncode == 0, done.stderr
    assert "Claims" in done.stdout
    assert report["run"]["name"] in bench.dpo("runs").stdout


@pytest.mark.parametrize(
    ("arm", "words"),
    [
        ({"settings": [{"parameters.gamma": 1}]}, "arm 'A', setting gamma=1"),
        ({"settings": [{"batch_size": 0}]}, "arm 'A', setting batch_size=0: batch_size"),
        ({"settings": [{}], "reward": "model"}, "reads no reward"),
        ({"settings": [{}], "method": "ppo", "guided": True}, "guided is not read"),
        ({"settings": [{"limit": 4}, {"limit": 4}]}, "has a setting twice"),
        ({"settings": []}, "settings"),
    ],
)
def test_a_wrong_arm_is_refused_before_anything_runs(bench: Bench, arm: dict[str, Any], words: str) -> None:
    recipe = study_recipe(bench, "wrong", arms=[{"name": "A", "method": "dpo"} | arm])
    done = bench.dpo("run", str(recipe))
    assert done.returncode == 2
    assert words in done.stderr
