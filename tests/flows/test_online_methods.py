"""GRPO or RLOO and online DPO beside DPO and PPO in one alignment, through the real command line."""

import inspect
import json
from pathlib import Path
from typing import Any, get_args

import pytest

from dpo_core.errors import RecipeError
from flows.cli.evaluate import evaluate
from tasks.reports.run_report import PolicyRow
from tasks.runs.record import new_run, save_run
from tasks.stages.standalone_evaluation import EvaluationRequest, evaluate_models
from tasks.stages.suite_results import find_model
from tests.flows.cli.test_plan import planned, reasons
from tests.support.runs.tiny_run import ENGINE, Bench

ROUNDS = {"iterations": 2, "episodes": 8, "micro_batch_size": 8, "epochs": 1, "engine": ENGINE}
RLOO = {"method": "grpo", "variant": "rloo", "group_size": 4, **ROUNDS}
ONLINE = {"method": "online_dpo", "renew_reference": True, **ROUNDS, "micro_batch_size": 4}
CHANGES = (
    *("--set", f"policies.RLOO={json.dumps(RLOO)}"),
    *("--set", f"policies.Online DPO={json.dumps(ONLINE)}"),
)


@pytest.fixture(scope="module")
def both(finished: tuple[Bench, dict[str, Any]]) -> tuple[Bench, dict[str, Any], dict[str, str]]:
    bench = finished[0].copy("online")
    foretold = reasons(planned(bench, *CHANGES))
    return bench, bench.run(*CHANGES), foretold


def test_only_the_new_methods_run(both) -> None:
    bench, report, foretold = both
    ran = [name for name, state in bench.states(report).items() if state == "ran"]
    assert ran == list(foretold) == ["train-grpo RLOO", "train-online_dpo Online DPO", "evaluate"]


def test_they_stand_beside_the_others(both) -> None:
    bench, report, _ = both
    names = [row["name"] for row in report["evaluation"]["policies"]]
    assert names == ["SFT", "DPO", "PPO", "RLOO", "Online DPO"]
    page = (bench.workspace / "runs" / report["run"]["name"] / "page.html").read_text()
    assert "Online DPO" in page
    assert {"train-grpo RLOO", "train-online_dpo Online DPO"} <= set(report["curves"])
    assert report["curves"]["train-grpo RLOO"][0]["val/ratio_first"] == 1.0


def test_a_policy_is_found_by_its_name_and_never_by_another(both) -> None:
    bench, report, _ = both
    run = report["run"]["name"]
    made = {stage["name"]: Path(stage["uri"].removeprefix("file://")) for stage in report["stages"]}
    stages = {
        "": "train-dpo DPO",
        ":sft": "prepare-sft",
        ":dpo": "train-dpo DPO",
        ":ppo": "train-ppo PPO",
        ":PPO": "train-ppo PPO",
        ":rloo": "train-grpo RLOO",
        ":online-dpo": "train-online_dpo Online DPO",
    }
    assert {name: find_model(run + name, bench.workspace) for name in stages} == {
        name: made[stage] for name, stage in stages.items()
    }
    for name in (":grpo", ":kto", ":nonsense", ":train-ppo", ":"):
        with pytest.raises(RecipeError, match=r"has no policy .* Its policies: .*PPO, RLOO, Online DPO"):
            find_model(run + name, bench.workspace)
    (bench.folder / "hhh_alignment.jsonl").touch()
    asked = EvaluationRequest(suites=["hhh"], data=str(bench.folder))
    with pytest.raises(RecipeError, match=f"{run} and {run}:dpo are the same model"):
        evaluate_models([run, f"{run}:dpo"], asked, bench.workspace)


def test_a_run_that_is_not_finished_is_no_model(tmp_path: Path) -> None:
    record = new_run(tmp_path, "tiny", "dpo run tiny")
    save_run(tmp_path, record)
    with pytest.raises(RecipeError, match="is not finished: its status is running"):
        find_model(f"{record.run_id}:ppo", tmp_path)


def test_the_help_names_the_policies() -> None:
    told = " ".join(inspect.unwrap(evaluate).__annotations__["model"].__metadata__[0].help.split())
    assert all(name in told for name in get_args(PolicyRow.model_fields["name"].annotation)[:-1])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("policies.A={method: grpo, variant: rloo, scale: group}", "not scaled"),
        ("policies.A={method: online_dpo, objective: kto}", "reads more than the log-probs of a pair"),
        (
            "policies.PPO.missing_eos=replace",
            "missing_eos has no effect, because missing_eos_penalty is not set",
        ),
        ("policies.A={method: grpo, engine: {zero_stage: 3}}", "use zero_stage 0 to 2"),
    ],
)
def test_what_would_not_be_read_is_refused(bench: Bench, change: str, words: str) -> None:
    done = bench.dpo("run", str(bench.recipe), "--set", change)
    assert done.returncode == 2
    assert words in done.stderr
