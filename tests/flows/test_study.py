"""A whole comparison study on a tiny model, through the real command line, Prefect, MLflow and torchrun."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient

from tests.support.runs.tiny_run import ENGINE, Bench

MODEL = {"max_steps": 2, "batch_size": 8, "micro_batch_size": 8, "engine": ENGINE}
GRID = {"DPO": {"parameters.beta": [0.1, 0.5]}, "PPO": {"kl_coef": [0.1]}}
FEW = ["DPO, few", "Pre-DPO, few"]


def study_recipe(bench: Bench, name: str = "study", **study: Any) -> Path:
    """Policies at several points, one that learns from a model, and one whose reference is another."""
    recipe = yaml.safe_load(bench.recipe.read_text())
    dpo, ppo = recipe["policies"]["DPO"], recipe["policies"]["PPO"]
    recipe["policies"] = {
        "DPO": dpo,
        "PPO": ppo | {"reward": "model"},
        "DPO, few": dpo | {"limit": 8},
        "Pre-DPO, few": dpo | {"limit": 8, "reference": "DPO, few"},
    }
    recipe["reward"]["model"] = MODEL
    recipe |= {
        "name": name,
        "study": {"seeds": [0], "grid": GRID, "hidden": FEW, "best_of": [2, 4]} | study,
    }
    path = bench.folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def studied(finished: tuple[Bench, dict[str, Any]]) -> tuple[Bench, Path, dict[str, Any]]:
    """A workspace in which a study has run, two policies at a time, after an alignment of the same data."""
    bench = finished[0].copy("study")
    recipe = study_recipe(bench, parallel=2)
    done = bench.dpo("run", str(recipe), "--json")
    assert done.returncode == 0, done.stderr
    return bench, recipe, json.loads(done.stdout)


def test_every_policy_is_measured_on_the_same_prompts(studied) -> None:
    _, _, report = studied
    study = report["study"]
    points = {(p["policy"], p["setting"], p["seed"]) for p in study["points"]}
    assert len(points) == 5
    assert ("DPO", "beta=0.5", 0) in points
    for point in study["points"]:
        assert len(point["rewards_P"]) == study["prompts"] == 6
        assert point["cost"]["flops"] > 0
        assert point["cost"]["seconds"] > 0
        assert point["cost"]["peak_memory_bytes"] > 0
    assert [b["n"] for b in study["best_of"]] == [2, 4]
    assert study["drawn"] == ["DPO", "PPO"]


def test_the_cost_of_a_policy_is_that_of_all_it_needed(studied) -> None:
    _, _, report = studied
    shared = {p["policy"]: set(p["shared_cost"]) for p in report["study"]["points"] if p["seed"] == 0}
    assert shared["DPO"] == {"sample-pairs", "cache-reference"}
    assert shared["PPO"] == {"sample-pairs", "train-reward"}, "the reward model learned from the pairs"
    assert shared["Pre-DPO, few"] == {
        "sample-pairs", "cache-reference", "train-dpo DPO, few seed 0", "cache-reference DPO, few seed 0",
    }  # fmt: skip
    states = {s["name"]: s["state"] for s in report["stages"]}
    # In the order of the recipe, whichever thread was faster.
    trained = [name for name in states if name.startswith("train-") and name.endswith("seed 0")]
    assert [name.split(" ")[1].rstrip(",") for name in trained[1:]] == ["DPO", "DPO", "PPO", "DPO", "Pre-DPO"]
    assert states["prepare-sft"] == states["sample-pairs"] == "cached", "the alignment had made them"


def test_the_page_the_picture_and_mlflow_have_it(studied) -> None:
    bench, _, report = studied
    folder = bench.workspace / "runs" / report["run"]["name"]
    assert "Pre-DPO, few" in (folder / "page.html").read_text()
    assert (folder / "frontier.png").stat().st_size > 10_000
    client = MlflowClient(f"sqlite:///{bench.workspace / 'mlflow.db'}")
    parent = client.get_run(report["run"]["mlflow_run_id"])
    assert {"area/dpo", "area/ppo"} <= set(parent.data.metrics)
    names = {a.path for a in client.list_artifacts(parent.info.run_id)}
    assert {"page.html", "frontier.png", "report.json"} <= names
    query = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    children = {r.info.run_name for r in client.search_runs([parent.info.experiment_id], query)}
    assert {"train-ppo PPO kl_coef=0.1 seed 0", "measure DPO beta=0.5 seed 0"} <= children


def test_a_second_study_runs_nothing_and_says_the_same(studied) -> None:
    bench, recipe, report = studied
    again = json.loads(bench.dpo("run", str(recipe), "--json").stdout)
    assert {s["state"] for s in again["stages"]} == {"cached"}
    assert again["study"] == report["study"]
    assert again["claims"] == report["claims"]


def test_the_plan_knows_every_policy(studied) -> None:
    bench, recipe, _ = studied
    done = bench.dpo("plan", str(recipe), "--json", "--set", "study.seeds=[0, 1]")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["stages"]
    coming = [row for row in rows if row["state"] == "runs"]
    assert all(row["name"].endswith("seed 1") for row in coming)
    trained = [row for row in coming if row["name"].startswith("train-")]
    assert [row["name"] for row in trained] == [
        "train-reward seed 1",
        "train-dpo DPO beta=0.1 seed 1",
        "train-dpo DPO beta=0.5 seed 1",
        "train-ppo PPO kl_coef=0.1 seed 1",
        "train-dpo DPO, few seed 1",
        "train-dpo Pre-DPO, few seed 1",
    ]
    assert all(row["flops"] > 0 and row["memory_bytes"] for row in trained)


def test_it_can_be_shown_again(studied) -> None:
    bench, _, report = studied
    done = bench.dpo("show", report["run"]["name"])
    assert done.returncode == 0, done.stderr
    assert "Claims" in done.stdout
    assert report["run"]["name"] in bench.dpo("runs").stdout
