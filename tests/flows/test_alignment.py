"""The whole run on a tiny model, through the real command line, Prefect, MLflow and torchrun."""

import json
import math
from pathlib import Path

import httpx
import pytest
import yaml
from mlflow import MlflowClient

from flows.commands.validate import judge_file
from tests.support.runs.tiny_run import prefect_address

STAGES = [
    "load-data",
    "import-model",
    "validate-prompts",
    "prepare-sft",
    "sample-pairs",
    "validate-pairs",
    "cache-reference",
    "train-dpo DPO",
    "train-ppo PPO",
    "evaluate",
]


def test_every_stage_runs_and_leaves_its_artifact(finished):
    bench, report = finished
    assert [stage["name"] for stage in report["stages"]] == STAGES
    assert set(bench.states(report).values()) == {"ran"}
    for stage in report["stages"]:
        folder = stage["uri"].removeprefix("file://")
        assert stage["sha256"] in folder
    assert [row["name"] for row in report["evaluation"]["policies"]] == ["SFT", "DPO", "PPO"]
    dpo = report["evaluation"]["policies"][1]
    assert dpo["gain"]["low"] <= dpo["gain"]["value"] <= dpo["gain"]["high"]
    assert report["model"]["alias"] == "challenger"


def test_the_page_and_the_record_are_there(finished):
    bench, report = finished
    folder = bench.workspace / "runs" / report["run"]["name"]
    page = (folder / "page.html").read_text()
    assert report["run"]["name"] in page
    assert json.loads((folder / "run.json").read_text())["status"] == "done"


def test_a_run_is_shown_whatever_its_folder_is_called(finished):
    from tests.scenarios.bad_inputs import dpo

    bench, report = finished
    place = bench.folder / "a[/b]c [red]:cat:" / "runs"
    name = report["run"]["name"]
    kept = place / "runs" / name
    kept.mkdir(parents=True)
    (kept / "report.json").write_bytes((bench.workspace / "runs" / name / "report.json").read_bytes())
    shown = dpo("show", name, "--workspace", str(place))
    assert shown.code == 0, shown.err
    assert f"page    {kept / 'page.html'}" in shown.out


def test_prefect_has_the_run_under_its_name(finished):
    wanted = {"flow_runs": {"name": {"any_": [finished[1]["run"]["name"]]}}}
    (flow_run,) = httpx.post(f"{prefect_address()}/flow_runs/filter", json=wanted).json()
    assert flow_run["state_type"] == "COMPLETED"


def test_tracking_has_one_parent_and_one_child_a_stage(finished):
    bench, report = finished
    client = MlflowClient(f"sqlite:///{bench.workspace / 'mlflow.db'}")
    parent = client.get_run(report["run"]["mlflow_run_id"])
    assert parent.info.status == "FINISHED"
    query = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    children = client.search_runs([parent.info.experiment_id], query)
    assert sorted(c.info.run_name for c in children) == sorted(STAGES)
    assert {c.info.status for c in children} == {"FINISHED"}
    trained = next(c for c in children if c.info.run_name == "train-dpo DPO")
    history = client.get_metric_history(trained.info.run_id, "rewards/margins")
    assert [m.step for m in sorted(history, key=lambda m: m.step)] == [1, 2, 3]
    assert abs(history[0].value) < 1e-4, "at the first step policy and reference are one"
    assert {i.dataset.name for i in trained.inputs.dataset_inputs} == {"policy", "pairs", "logps"}
    version = client.get_model_version_by_alias("dpo-tiny", "challenger")
    assert version.tags["dpo.weights_uri"] == report["model"]["uri"]


def test_what_was_computed_is_counted_and_stands_on_the_page(finished):
    bench, report = finished
    extras = {stage["name"]: _manifest(bench, report, stage["name"])["extra"] for stage in report["stages"]}
    counted = {name: extra["flops"] for name, extra in extras.items() if "flops" in extra}
    read = {"sample-pairs", "cache-reference", "evaluate"}
    trained = {"prepare-sft", "train-dpo DPO", "train-ppo PPO"}
    assert counted.keys() == read | trained
    assert all(counted[name] > 0 for name in counted.keys() - {"train-ppo PPO"})
    assert report["cost"]["flops"] == sum(counted.values())
    peaks = [extras[name]["peak_memory_bytes"] for name in trained]
    assert report["cost"]["peak_memory_bytes"] == max(peaks) > 200 << 20
    assert 0 < extras["train-dpo DPO"]["seconds"] < 600
    # Three forward passes of training are one of reading: each pair is trained on once in a while.
    assert 0.1 < counted["train-dpo DPO"] / (3 * counted["cache-reference"]) < 10
    page = (bench.workspace / "runs" / report["run"]["name"] / "page.html").read_text()
    assert "<dt>Compute</dt>" in page
    assert "<dt>Peak memory</dt>" in page
    client = MlflowClient(f"sqlite:///{bench.workspace / 'mlflow.db'}")
    assert (
        client.get_run(report["run"]["mlflow_run_id"]).data.metrics["cost/flops"] == report["cost"]["flops"]
    )
    runs = {stage["name"]: stage["mlflow_run_id"] for stage in report["stages"]}
    for name in ("train-dpo DPO", "evaluate"):
        assert client.get_run(runs[name]).data.metrics["cost/flops"] == counted[name]
    curve = Path(
        report["stages"][STAGES.index("train-dpo DPO")]["uri"].removeprefix("file://"), "metrics.jsonl"
    )
    names = set(json.loads(curve.read_text().splitlines()[0]))
    assert not names & {"time", "seconds_per_step", "tokens_per_second"}, "the same training, the same bytes"


def test_the_command_on_the_page_does_the_run_again_and_computes_nothing(finished):
    bench, first = finished
    kept = bench.workspace / "runs" / first["run"]["name"] / "recipe.yaml"
    assert first["run"]["command"] == f"dpo run {kept}"
    assert first["run"]["started_by"].startswith(f"dpo run {bench.recipe}")
    facts = yaml.safe_load(kept.read_text())
    assert (facts["seed"], facts["policies"]["DPO"]["max_steps"]) == (0, 3)
    index = bench.index()
    done = bench.dpo("run", str(kept), "--json")
    assert done.returncode == 0, done.stderr
    again = json.loads(done.stdout)
    assert set(bench.states(again).values()) == {"cached"}
    assert bench.index() == index
    assert again["evaluation"] == first["evaluation"]
    assert first["run"]["name"] not in again["run"]["command"]
    # The same weights are not registered again.
    model = again["model"]
    assert (model["version"], model["known"], model["alias"]) == (first["model"]["version"], True, None)
    client = MlflowClient(f"sqlite:///{bench.workspace / 'mlflow.db'}")
    version = client.get_model_version(model["name"], model["version"])
    assert version.run_id == first["run"]["mlflow_run_id"]


@pytest.mark.slow
def test_pre_dpo_trains_a_guide_and_starts_again(finished):
    """Both passes from the SFT model; the guide is the reference of the second, and nothing else changes."""
    bench, first = finished
    own = bench.copy("guided")
    recipe = yaml.safe_load(own.recipe.read_text())
    recipe["policies"]["Guide"] = dict(recipe["policies"]["DPO"])
    recipe["policies"]["DPO"]["reference"] = "Guide"
    own.recipe.write_text(yaml.safe_dump(recipe, sort_keys=False))
    report = own.run()
    states = own.states(report)
    # The guide is what the first run's policy was: same start, same pairs, same settings.
    assert states["train-dpo Guide"] == "cached"
    ran = [name for name, state in states.items() if state == "ran"]
    assert ran == ["cache-reference Guide", "train-dpo DPO", "evaluate"]
    stages = {stage["name"]: stage for stage in report["stages"]}
    before = {stage["name"]: stage for stage in first["stages"]}
    assert stages["train-dpo Guide"]["sha256"] == before["train-dpo DPO"]["sha256"]
    curve = Path(stages["train-dpo DPO"]["uri"].removeprefix("file://"), "metrics.jsonl").read_text()
    start = json.loads(curve.splitlines()[0])
    assert start["rewards/margins"] < 0, "the start ranks the pairs less well than its guide"
    assert start["loss"] > math.log(2)


@pytest.mark.slow
def test_a_changed_row_recomputes_only_its_own_log_probs(finished):
    bench, _ = finished
    own = bench.copy("one-row")
    rows = [
        {"prompt": f"The soup of day {i} was", "chosen": " good and warm.", "rejected": f" bad and cold {i}."}
        for i in range(30)
    ]
    data = own.folder / "pairs.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    recipe = yaml.safe_load(own.recipe.read_text())
    recipe["data"] = {"path": str(data), "eval_fraction": 0.2}
    recipe["sft"] = {"enabled": False}
    del recipe["pairs"], recipe["policies"]["PPO"]
    own.recipe.write_text(yaml.safe_dump(recipe))
    before = own.run()
    train_rows = _pairs(before)
    changed = next(i for i, row in enumerate(rows) if row["prompt"] in train_rows)
    rows[changed]["chosen"] = " good, warm and large."
    data.write_text("\n".join(map(json.dumps, rows)))
    after = own.run()
    facts = _manifest(own, after, "cache-reference")["extra"]
    assert facts["computed"] == 1, "one new answer, one forward pass"
    assert facts["from_cache"] == facts["sequences"] - 1


def _pairs(report: dict) -> set[str]:
    import pandas as pd

    stage = next(s for s in report["stages"] if s["name"] == "validate-pairs")
    frame = pd.read_parquet(stage["uri"].removeprefix("file://") + "/data.parquet")
    return set(frame[frame["split"] == "train"]["prompt"])


def _manifest(bench, report: dict, name: str) -> dict:
    sha256 = next(s["sha256"] for s in report["stages"] if s["name"] == name)
    for path in (bench.workspace / "store" / "index" / name.partition(" ")[0]).glob("*.json"):
        manifest = json.loads(path.read_text())["manifest"]
        if manifest["sha256"] == sha256:
            return manifest
    raise AssertionError(f"no manifest of {name}")


@pytest.mark.slow
def test_a_damaged_artifact_is_rebuilt(finished):
    bench, first = finished
    own = bench.copy("damaged")
    stage = next(s for s in first["stages"] if s["name"] == "train-dpo DPO")
    weights = own.workspace / "store" / stage["uri"].split("/store/")[1] / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    done = own.dpo("run", str(own.recipe), "--json")
    assert done.returncode == 0, done.stderr
    assert "is damaged" in done.stderr
    report = json.loads(done.stdout)
    ran = {name for name, state in own.states(report).items() if state == "ran"}
    assert ran == {"train-dpo DPO"}, "rebuilt bit for bit, so that nothing after it has to run"


@pytest.mark.slow
def test_a_refusal_stops_everything_after_it(finished):
    bench, _ = finished
    own = bench.copy("refused")
    rows = [{"prompt": f"Question {i}", "chosen": "the same", "rejected": "the same"} for i in range(30)]
    data = own.folder / "same.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    recipe = yaml.safe_load(own.recipe.read_text())
    recipe["data"] = {"path": str(data)}
    del recipe["pairs"], recipe["sft"]["made_demonstrations"]
    own.recipe.write_text(yaml.safe_dump(recipe))
    before = own.index()
    done = own.dpo("run", str(own.recipe))
    assert done.returncode == 3, done.stderr
    assert "pairs/identical" in done.stderr
    assert "30" in done.stderr
    new = {name.split("/")[0] for name in own.index().keys() - before.keys()}
    assert new == {"load-data"}, "nothing downstream of the gate ran"
    client = MlflowClient(f"sqlite:///{own.workspace / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("dpo/tiny").experiment_id
    failed = client.search_runs([experiment], "attributes.status = 'FAILED'")
    assert {run.info.run_name.split("-2")[0] for run in failed} == {"validate-pairs", "tiny"}
    assert all("pairs/identical" in run.data.tags["dpo.error"] for run in failed)


def test_an_earlier_report_is_the_baseline_of_drift(finished):
    bench, report = finished
    stage = next(s for s in report["stages"] if s["name"] == "validate-pairs")
    baseline = stage["uri"].removeprefix("file://") + "/gate.json"
    russian = bench.folder / "russian.jsonl"
    rows = [
        {"prompt": f"Какой был фильм {i}", "chosen": f"Очень хороший {i}", "rejected": f"Плохой фильм {i}"}
        for i in range(30)
    ]
    russian.write_text("\n".join(map(json.dumps, rows)))
    judged, _, _ = judge_file(str(russian), [f"gate.baseline={baseline}"])
    (finding,) = (one for one in judged.findings if one.rule == "pairs/script_drift")
    assert (finding.passed, finding.severity, judged.refused) == (False, "warning", False)
