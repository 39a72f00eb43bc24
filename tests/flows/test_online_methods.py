"""GRPO or RLOO and online DPO beside DPO and PPO in one alignment, through the real command line."""

import json
from typing import Any

import pytest

from tests.flows.test_plan import planned, reasons
from tests.tiny_run import ENGINE, Bench

ROUNDS = {"iterations": 2, "episodes": 8, "micro_batch_size": 8, "epochs": 1, "engine": ENGINE}
CHANGES = (
    "--set",
    f"grpo={json.dumps({**ROUNDS, 'variant': 'rloo', 'group_size': 4})}",
    "--set",
    f"online={json.dumps({**ROUNDS, 'micro_batch_size': 4, 'reference': 'each_round'})}",
)


@pytest.fixture(scope="module")
def both(finished: tuple[Bench, dict[str, Any]]) -> tuple[Bench, dict[str, Any], dict[str, str]]:
    bench = finished[0].copy("online")
    foretold = reasons(planned(bench, *CHANGES))
    return bench, bench.run(*CHANGES), foretold


def test_only_the_new_methods_run(both) -> None:
    bench, report, foretold = both
    ran = [name for name, state in bench.states(report).items() if state == "ran"]
    assert ran == list(foretold) == ["train-grpo", "train-online", "evaluate"]


def test_they_stand_beside_the_others(both) -> None:
    bench, report, _ = both
    names = [row["name"] for row in report["evaluation"]["policies"]]
    assert names == ["SFT", "DPO", "PPO", "RLOO", "Online DPO"]
    page = (bench.workspace / "runs" / report["run"]["name"] / "page.html").read_text()
    assert "Online DPO" in page
    assert {"grpo", "online"} <= set(report["curves"])
    assert report["curves"]["grpo"][0]["val/ratio_first"] == 1.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("grpo={variant: rloo, scale: group}", "not scaled"),
        ("online={objective: kto}", "reads more than the log-probs of a pair"),
        ("ppo={missing_eos: replace}", "missing_eos is read only where missing_eos_penalty is set"),
        ("grpo={engine: {zero_stage: 3}}", "use zero_stage 0 to 2"),
    ],
)
def test_what_would_not_be_read_is_refused(bench: Bench, change: str, words: str) -> None:
    done = bench.dpo("run", str(bench.recipe), "--set", change)
    assert done.returncode == 2
    assert words in done.stderr
