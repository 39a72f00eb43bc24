"""A graph of policies through the real command line: chains, other references, another candidate, resume."""

import json
import math
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from tests.flows.cli.test_plan import planned, reasons
from tests.support.runs.tiny_run import SIZES, Bench

CHAIN = ("train-dpo DPO", "train-grpo GRPO", "train-dpo Last")


def curve(report: dict[str, Any], stage: str) -> list[dict[str, float]]:
    uri = next(s["uri"] for s in report["stages"] if s["name"] == stage)
    text = Path(uri.removeprefix("file://"), "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_policies_added_to_a_finished_run_are_all_that_is_trained(graph) -> None:
    bench, report, foretold = graph
    ran = [name for name, state in bench.states(report).items() if state == "ran"]
    assert ran == list(foretold) == [
        "train-reward", "train-grpo GRPO", "cache-reference DPO", "train-dpo Last", "train-dpo Pre-DPO",
        "train-online_dpo Online DPO", "train-ppo PPO", "evaluate",
    ]  # fmt: skip
    assert (foretold["train-reward"], foretold["train-ppo PPO"]) == ("new", "changed")
    names = [row["name"] for row in report["evaluation"]["policies"]]
    assert names == ["SFT", "Last", "Pre-DPO", "GRPO", "Online DPO", "DPO", "PPO"]
    page = (bench.workspace / "runs" / report["run"]["name"] / "page.html").read_text()
    assert "Online DPO" in page
    assert {"train-grpo GRPO", "train-online_dpo Online DPO"} <= set(report["curves"])


def test_each_reads_its_start_and_its_reference(graph) -> None:
    bench, report, _ = graph
    client = MlflowClient(f"sqlite:///{bench.workspace / 'mlflow.db'}")
    inputs_of = ("train-grpo GRPO", "train-dpo Last", "train-dpo Pre-DPO")
    digests = {stage["sha256"][:36]: stage["name"] for stage in report["stages"]}
    inputs = {
        stage["name"]: {
            one.dataset.name: digests[one.dataset.digest]
            for one in client.get_run(stage["mlflow_run_id"]).inputs.dataset_inputs
        }
        for stage in report["stages"]
        if stage["name"] in inputs_of
    }
    pairs = {"pairs": "validate-pairs"}
    assert inputs == {
        "train-grpo GRPO": {
            "policy": "train-dpo DPO", "reference": "prepare-sft", "prompts": "validate-prompts",
        },
        "train-dpo Last": pairs | {"policy": "train-grpo GRPO", "logps": "cache-reference DPO"},
        "train-dpo Pre-DPO": pairs | {"policy": "prepare-sft", "logps": "cache-reference DPO"},
    }  # fmt: skip


def test_a_start_that_is_not_the_reference_begins_away_from_it(graph) -> None:
    _, report, _ = graph
    assert curve(report, "train-ppo PPO")[0]["objective/kl"] == pytest.approx(0, abs=1e-6)
    assert abs(curve(report, "train-grpo GRPO")[0]["objective/kl"]) > 1e-4
    assert curve(report, "train-grpo GRPO")[0]["val/ratio_first"] == 1.0
    for name in ("Last", "Pre-DPO"):
        first = curve(report, f"train-dpo {name}")[0]
        assert abs(first["rewards/margins"]) > 1e-6
        assert first["loss"] != pytest.approx(math.log(2), abs=1e-7)
    # Pre-DPO starts from the SFT model, which ranks the pairs less well than its reference.
    assert curve(report, "train-dpo Pre-DPO")[0]["rewards/margins"] < 0


def test_the_candidate_is_registered_and_can_be_promoted(graph) -> None:
    bench, report, _ = graph
    stage = next(s for s in report["stages"] if s["name"] == "train-grpo GRPO")
    assert report["model"]["uri"] == stage["uri"]
    own = bench.copy("promoted")
    refused = own.dpo("promote", report["run"]["name"], "--json")
    assert refused.returncode in (0, 5), refused.stderr
    done = own.dpo("promote", report["run"]["name"], "--force", "--reason", "a test", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["champion"] == report["model"]["version"]


def test_a_changed_policy_and_those_that_need_it_are_trained_again(graph) -> None:
    bench = graph[0]
    changed = {"train-grpo GRPO": "changed", "train-dpo Last": "data", "evaluate": "data"}
    assert reasons(planned(bench, "--set", "policies.GRPO.kl_coef=0.2")) == changed
    leaf = {"train-dpo Last": "changed", "evaluate": "data"}
    assert reasons(planned(bench, "--set", "policies.Last.parameters.beta=0.2")) == leaf
    root = reasons(planned(bench, "--set", "policies.DPO.parameters.beta=0.2"))
    assert root.keys() == {*CHAIN, "cache-reference DPO", "train-dpo Pre-DPO", "evaluate"}
    without = reasons(planned(bench, "--set", "policies.Last=null"))
    assert without == {"evaluate": "data"}
    assert reasons(planned(bench, "--set", "candidate=DPO")) == {}


def test_policies_that_read_other_log_probs_of_one_reference_have_a_stage_each(graph) -> None:
    """KTO reads log-probs of mismatched pairs too, and another precision is another number."""
    bench = graph[0]
    kto, bf16 = ({"method": "kto", **SIZES}, {"method": "dpo", **SIZES, "engine": {"precision": "bf16"}})
    changes = [f"policies.KTO={json.dumps(kto)}", f"policies.B={json.dumps(bf16)}", "policies.Last=null"]
    rows = planned(bench, *(word for change in changes for word in ("--set", change)))["stages"]
    coming = {row["name"]: row for row in rows if row["state"] == "runs"}
    caches = {name for name in coming if name.startswith("cache-")}
    assert caches == {"cache-reference for KTO", "cache-reference for B"}
    tokens = {name: coming[name]["tokens"] for name in caches}
    assert tokens["cache-reference for KTO"] > 1.5 * tokens["cache-reference for B"] > 0


@pytest.mark.slow
def test_kto_beside_dpo_on_the_same_pairs(graph) -> None:
    bench = graph[0].copy("beside")
    change = f"policies.KTO={json.dumps({'method': 'kto', **SIZES})}"
    report = bench.run("--set", change)
    ran = [name for name, state in bench.states(report).items() if state == "ran"]
    assert ran == ["cache-reference for KTO", "train-kto KTO", "evaluate"]


def _forget(bench: Bench, report: dict[str, Any], names: set[str]) -> None:
    """Take these stages' entries out of the store's index."""
    wanted = {stage["sha256"] for stage in report["stages"] if stage["name"] in names}
    for path in (bench.workspace / "store" / "index").glob("*/*.json"):
        if json.loads(path.read_text())["manifest"]["sha256"] in wanted:
            path.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("node", CHAIN)
def test_a_run_killed_in_any_node_goes_on_there(graph, node: str) -> None:
    whole, report, _ = graph
    bench = whole.copy(f"killed-{node.rpartition(' ')[2]}")
    before = bench.index()
    later = {*CHAIN[CHAIN.index(node) :], "evaluate"}
    _forget(bench, report, later)
    log = bench.folder / "killed.log"
    with log.open("w") as stream:
        flow = subprocess.Popen(
            bench.command("run", str(bench.recipe)), env=bench.environment(), cwd=bench.folder, stderr=stream
        )
    until = time.monotonic() + 600
    while f"{node}: running" not in log.read_text():
        assert flow.poll() is None, log.read_text()
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.05)
    flow.send_signal(signal.SIGKILL)
    flow.wait()
    resumed = bench.run("--resume")
    assert {name for name, state in bench.states(resumed).items() if state == "ran"} == later
    assert bench.index() == before, "the same artifacts, bit for bit"
    assert resumed["evaluation"] == report["evaluation"]
