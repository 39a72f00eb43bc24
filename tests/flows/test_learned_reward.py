"""PPO under a learned reward while a known one measures, through the real command line."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient

from dpo_core.data.tokens.config import TokenConfig
from dpo_core.data.tokens.tokenise import Tokenise
from dpo_core.models.load import load_tokenizer
from dpo_core.models.reward_model import RewardModel
from dpo_core.rewards.model import score
from tests.flows.cli.test_plan import planned
from tests.support.runs.tiny_run import ENGINE, Bench

MODEL = {"max_steps": 2, "batch_size": 8, "micro_batch_size": 8, "engine": ENGINE}
LEARNED = ("--set", "policies.PPO.reward=model", "--set", f"reward.model={json.dumps(MODEL)}")


def test_ppo_learns_from_the_model_and_the_known_reward_measures(graph, finished) -> None:
    bench, report, _ = graph
    client = MlflowClient(f"sqlite:///{bench.workspace / 'mlflow.db'}")
    runs = {s["name"]: client.get_run(s["mlflow_run_id"]) for s in report["stages"] if s["state"] == "ran"}
    read = {i.dataset.name for i in runs["train-ppo PPO"].inputs.dataset_inputs}
    assert read == {"reference", "prompts", "reward_model"}
    params = runs["train-ppo PPO"].data.params
    assert "reward" not in params
    assert params["gold"].startswith("vowels of ")
    read = {i.dataset.name for i in runs["evaluate"].inputs.dataset_inputs}
    assert "reward_model" not in read
    assert report["evaluation"]["reward_name"].endswith("vowels.py:vowels")
    assert report["evaluation"]["reward_is_true"] is True
    # The same first samples as in the run that learned from the known reward, and other scores for them.
    before, now = (r["curves"]["train-ppo PPO"][0] for r in (finished[1], report))
    assert now["completions/mean_length"] == before["completions/mean_length"]
    assert now["objective/scores"] != before["objective/scores"]


def test_the_quality_of_the_model_is_on_the_page_and_in_tracking(graph) -> None:
    bench, report, _ = graph
    quality = report["reward_model"]
    client = MlflowClient(f"sqlite:///{bench.workspace / 'mlflow.db'}")
    stage = next(s for s in report["stages"] if s["name"] == "train-reward")
    metrics = client.get_run(stage["mlflow_run_id"]).data.metrics
    assert metrics["eval_rewards/accuracies"] == quality["accuracy"]["value"]
    assert metrics["eval_calibration/ece"] == quality["ece"]
    assert metrics["eval_calibration/brier"] == quality["brier"]
    assert metrics["eval_calibration/nll"] == quality["nll"]
    assert metrics.get("eval_calibration/temperature") == quality["temperature"]
    assert metrics.get("eval_length/spearman") == quality["length_spearman"]
    page = (bench.workspace / "runs" / report["run"]["name"] / "page.html").read_text()
    assert f"{quality['pairs']} held-out pairs. PPO learned from it." in page


def test_calibration_is_that_of_the_gaps_that_the_loss_trained(graph) -> None:
    """The artifact's rewards are normalised; before that, their gaps are the logits of the labels."""
    _, report, _ = graph
    quality = report["reward_model"]
    frame = pd.read_parquet(_folder(report, "validate-pairs") / "data.parquet")
    frame = frame[frame["split"] == "eval"]
    assert quality["pairs"] == len(frame) > 0
    folder = _folder(report, "train-reward")
    tokenise = Tokenise(load_tokenizer(folder), TokenConfig(max_length=96, max_prompt_length=64))
    pairs, _ = tokenise.pairs(frame.to_dict("records"))
    model = RewardModel.load(folder)
    assert abs(float(model.gain) - 1) > 0.01
    rewards = np.array(score(model, [s for p in pairs for s in (p.chosen, p.rejected)], "fp32"))
    gaps = (rewards[0::2] - rewards[1::2]) / float(model.gain)
    assert quality["accuracy"]["value"] == (gaps > 0).mean()
    assert quality["nll"] == pytest.approx(np.logaddexp(0, -gaps).mean(), rel=1e-5)


def _folder(report: dict[str, Any], name: str) -> Path:
    return Path(next(s["uri"] for s in report["stages"] if s["name"] == name).removeprefix("file://"))


def test_the_plan_counts_the_reward_model_in_ppos_memory(finished: tuple[Bench, dict[str, Any]]) -> None:
    def memory(*changes: str) -> dict[str, int]:
        plan = planned(finished[0], "--set", "policies.PPO.kl_coef=0.3", *changes)
        return next(s["memory_parts"] for s in plan["stages"] if s["name"] == "train-ppo PPO")

    # The reference, and the critic with its gradients and two moments, are there in both: five models.
    assert 5 * memory(*LEARNED)["reference"] == 6 * memory()["reference"] > 0
