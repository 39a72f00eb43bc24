"""`dpo plan` on the tiny recipe: what it foretells is what a run then does, and it leaves no trace."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from dpo_core.errors import ModelError
from flows.cli.main import app
from tasks.planning.plan import Plan
from tasks.recipe.read import load_recipe
from tests.support.models.tiny import make_tokenizer
from tests.support.runs.tiny_run import Bench


def planned(bench: Bench, *arguments: str) -> dict:
    """The command line, in this process: importing the libraries again would take most of the time."""
    arguments = ("plan", str(bench.recipe), "--json", *arguments)
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def states(plan: dict) -> dict[str, str]:
    return {stage["name"]: stage["state"] for stage in plan["stages"]}


def reasons(plan: dict) -> dict[str, str]:
    return {stage["name"]: stage["why"] for stage in plan["stages"] if stage["state"] == "runs"}


def contents(folder: Path) -> dict[str, tuple[int, bytes | None]]:
    """Every file and folder with its time of change and its bytes."""
    return {
        str(path.relative_to(folder)): (
            path.stat().st_mtime_ns,
            path.read_bytes() if path.is_file() else None,
        )
        for path in sorted(folder.rglob("*"))
    }


def empty(bench: Bench, tmp_path: Path, **changes: object) -> Bench:
    """The recipe on a workspace that is not there."""
    folder = tmp_path / "own"
    folder.mkdir()
    recipe = yaml.safe_load(bench.recipe.read_text()) | {"workspace": str(folder / "runs")} | changes
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    return Bench(folder)


def test_in_an_empty_workspace_all_is_new_and_nothing_is_made(bench, tmp_path):
    own = empty(bench, tmp_path)
    plan = planned(own)
    assert not own.workspace.exists()
    assert set(reasons(plan).values()) == {"new"}
    assert not any("chat template" in line for line in plan["warnings"]), "openings are to be continued"
    assert len(plan["stages"]) == 10
    stages = {stage["name"]: stage for stage in plan["stages"]}
    for name in ("prepare-sft", "train-dpo DPO", "train-ppo PPO"):
        parts = stages[name]["memory_parts"]
        assert stages[name]["memory_bytes"] == sum(parts.values()) > parts["process"] > 0
    assert "at most 6 per prompt" in stages["train-dpo DPO"]["note"]
    # The run has at most six pairs of 24 prompts, 70 % of them in training; 3 steps of 8 pairs are trained.
    assert 0 < stages["train-dpo DPO"]["tokens"] <= 3 * 8 * 96
    assert plan["flops"] == sum(stage["flops"] for stage in plan["stages"]) > 0
    told = [line for line in plan["warnings"] if "policy PPO alone" not in line]
    assert [line.split(",")[0] for line in told] == ["6 held-out prompts will be compared"]


def test_after_a_run_all_is_cached_and_not_a_byte_is_changed(finished):
    bench, report = finished
    before = contents(bench.workspace)
    plan = planned(bench)
    assert contents(bench.workspace) == before
    assert list(states(plan)) == [stage["name"] for stage in report["stages"]]
    assert set(states(plan).values()) == {"cached"}
    assert (plan["tokens"], plan["flops"], plan["seconds"]) == (0, 0, 0)


def test_another_learning_rate_runs_training_and_evaluation(finished, monkeypatch):
    bench, _ = finished
    newest = max(path.name for path in (bench.workspace / "runs").iterdir())
    rate = "policies.DPO.optim.learning_rate"
    changes = (
        "--set",
        f"{rate}=6e-5",
        "--set",
        "policies.GRPO={method: grpo, group_size: 2, episodes: 32}",
        "--set",
        "policies.PPO=null",
    )
    plan = planned(bench, *changes)
    assert reasons(plan) == {"train-dpo DPO": "changed", "train-grpo GRPO": "new", "evaluate": "data"}
    assert plan["compared_with"] == newest
    learning_rate = load_recipe(str(bench.recipe)).policies["DPO"].optim.learning_rate
    assert plan["changes"] == [
        "policies.GRPO: new",
        "policies.PPO: removed",
        f"{rate}: {learning_rate} -> 6e-05",
    ]
    monkeypatch.setattr("flows.commands.plan.plan_recipe", lambda _: Plan.model_validate(plan))
    printed = CliRunner().invoke(app, ["plan", str(bench.recipe)]).stdout
    assert rate in printed.partition("total")[0]
    assert "runs: new policy" in printed
    assert f"compared with {newest}: policies.GRPO: new; " in printed


def test_another_definition_of_log_probs_computes_them_anew(finished, monkeypatch):
    monkeypatch.setattr("tasks.stages.models.DEFINITION_VERSION", 99)
    plan = planned(finished[0])
    assert reasons(plan) == {"cache-reference": "changed", "train-dpo DPO": "data", "evaluate": "data"}


@pytest.mark.slow
def test_what_a_run_then_does_is_what_was_planned(finished):
    own = finished[0].copy("plan-rate")
    change = ("--set", "policies.DPO.optim.learning_rate=7e-5")
    plan = planned(own, *change)
    assert reasons(plan) == {"train-dpo DPO": "changed", "evaluate": "data"}
    report = own.run(*change)
    told = {name for name, state in states(plan).items() if state == "runs"}
    assert told == {name for name, state in own.states(report).items() if state == "ran"}
    assert set(states(planned(own, *change)).values()) == {"cached"}
    # The pairs were there to be counted, so that the tokens are those of the training itself.
    manifests = [
        json.loads(path.read_text())["manifest"]
        for path in (own.workspace / "store" / "index" / "train-dpo").glob("*.json")
    ]
    trained = {m["extra"]["tokens_trained"] for m in manifests}
    told_tokens = next(s["tokens"] for s in plan["stages"] if s["name"] == "train-dpo DPO")
    assert 0.4 * max(trained) < told_tokens < max(trained), "prompts are shared, and read once"


SCRATCH = "model.scratch={layers: 3, hidden_size: 48, heads: 4}"


def test_a_model_from_scratch_is_planned_in_its_own_size(finished):
    bench = finished[0]
    plan = planned(bench, "--set", SCRATCH)
    assert reasons(plan)["import-model"] == "changed"
    layer = 4 * 48 * 48 + 3 * 48 * 192 + 2 * 48
    tokens = len(make_tokenizer())
    assert plan["parameters"] == 3 * layer + 48 + 48 * tokens
    smaller = planned(bench, "--set", SCRATCH.replace("layers: 3", "layers: 1"), "--set", "policies.PPO=null")
    assert smaller["parameters"] == plan["parameters"] - 2 * layer
    flops = [{s["name"]: s["flops"] for s in p["stages"]}["prepare-sft"] for p in (smaller, plan)]
    assert flops[0] < flops[1]


@pytest.mark.slow
def test_a_run_from_scratch(finished):
    """From random weights to a verdict; the settings are part of the key, and the plan knows the model."""
    own = finished[0].copy("scratch")
    settings = ("--set", SCRATCH, "--set", "sft.epochs=40", "--set", "sft.optim.learning_rate=5e-3")
    report = own.run(*settings)
    size = next(s["parameters"] for s in report["stages"] if s["name"] == "import-model")
    again = planned(own, *settings)
    assert again["parameters"] == size
    assert set(states(again).values()) == {"cached"}
    other = planned(own, *settings, "--set", "model.scratch.seed=1")
    assert states(other)["load-data"] == "cached"
    assert states(other)["import-model"] == "runs"


def test_a_damaged_artifact_is_planned_to_be_made_again_and_left_alone(finished):
    own = finished[0].copy("plan-damaged")
    stage = next(s for s in finished[1]["stages"] if s["name"] == "train-dpo DPO")
    weights = own.workspace / "store" / stage["uri"].split("/store/")[1] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    before = contents(own.workspace)
    assert reasons(planned(own)) == {"train-dpo DPO": "damaged", "evaluate": "data"}
    assert contents(own.workspace) == before


def test_given_pairs_and_the_objectives_around_them(bench, tmp_path):
    data = tmp_path / "pairs.jsonl"
    data.write_text(
        "\n".join(
            f'{{"prompt": "Soup {i} was", "chosen": " good and warm.", "rejected": " bad and cold {i}."}}'
            for i in range(30)
        )
    )
    own = empty(bench, tmp_path, data={"path": str(data), "eval_fraction": 0.2}, sft={})
    recipe = yaml.safe_load(own.recipe.read_text())
    del recipe["pairs"], recipe["reward"], recipe["policies"]["PPO"]
    own.recipe.write_text(yaml.safe_dump(recipe))
    plan = planned(own)
    names = list(states(plan))
    assert "train-reward" in names
    assert "sample-pairs" not in names
    stages = {stage["name"]: stage for stage in plan["stages"]}
    assert stages["train-dpo DPO"]["note"] == ""
    unlike = planned(
        own,
        "--set",
        "policies.DPO={method: dpo, objective: SimPO, parameters: {beta: 0.1}, engine: {threads: 1}}",
        "--set",
        "evaluate.sampling.max_new_tokens=2",
        "--set",
        "tokens.template=chat",
    )
    assert "DPO: simpo with beta 0.1 (its default: 2; 0.1 is dpo's)" in unlike["warnings"]
    assert [line for line in unlike["warnings"] if "100.0% of the answers are cut" in line]
    assert any("are written without the model's chat template" in line for line in plan["warnings"])
    assert not any("chat template" in line for line in unlike["warnings"])
    # A live reference is one more model in memory, and one more forward pass.
    live = planned(own, "--set", "policies.DPO.reference_sync={}")
    moved = {stage["name"]: stage for stage in live["stages"]}["train-dpo DPO"]
    assert moved["memory_parts"]["reference"] == moved["memory_parts"]["weights"] > 0
    assert 1.2 < moved["flops"] / stages["train-dpo DPO"]["flops"] < 1.4


@pytest.mark.parametrize(
    ("settings", "cached"),
    [
        ({"objective": "sft", "plus": [{"objective": "cpo"}]}, False),
        ({"objective": "cpo", "plus": [{"objective": "dpo"}]}, True),
        ({"reference_sync": {}}, False),
    ],
    ids=str,
)
def test_log_probs_are_cached_only_where_they_are_read(finished, settings, cached):
    """Not for objectives without a reference, nor beside one in memory."""
    changes = [part for k, v in settings.items() for part in ("--set", f"policies.DPO.{k}={json.dumps(v)}")]
    plan = planned(finished[0], *changes)
    assert ("cache-reference" in states(plan)) == cached
    assert reasons(plan)["train-dpo DPO"] in ("changed", "data")


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["simpo", "tdpo2"])
def test_a_run_without_cached_log_probs(finished, objective):
    own = finished[0].copy(f"without-{objective}")
    report = own.run("--set", f"policies.DPO.objective={objective}")
    stages = {stage["name"]: stage["parents"] for stage in report["stages"]}
    assert "cache-reference" not in stages
    assert ("prepare-sft" in stages["train-dpo DPO"]) is True
    assert report["model"]["alias"] == "challenger"
    assert set(states(planned(own, "--set", f"policies.DPO.objective={objective}")).values()) == {"cached"}


@pytest.mark.parametrize(("objective", "times"), [("kto", 2), ("bco", 1)])
def test_unpaired_rows(bench, tmp_path, objective, times):
    rows = [
        {
            "prompt": f"Day {i} was",
            "completion": " good." if i % 3 else " bad and cold.",
            "label": bool(i % 3),
        }
        for i in range(60)
    ]
    data = tmp_path / "ratings.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    policies = {"KTO": {"method": "kto", "objective": objective}}
    changes = {"data": {"path": str(data), "eval_fraction": 0.2}, "sft": {}, "policies": policies}
    own = empty(bench, tmp_path, **changes)
    recipe = yaml.safe_load(own.recipe.read_text())
    del recipe["pairs"]
    own.recipe.write_text(yaml.safe_dump(recipe))
    plan = planned(own)
    assert "validate-unpaired" in states(plan)
    stages = {stage["name"]: stage for stage in plan["stages"]}
    epoch = stages["train-kto KTO"]["tokens"]
    # KTO reads log-probs of mismatched pairs too.
    assert stages["cache-reference"]["tokens"] == pytest.approx(times * epoch, rel=0.2)
    assert 0 < stages["prepare-sft"]["tokens"] < 0.8 * epoch, "the desirable answers alone"
    assert stages["train-kto KTO"]["memory_bytes"] > 0
    fewer = planned(own, "--set", "policies.KTO.limit=16")
    assert {s["name"]: s for s in fewer["stages"]}["train-kto KTO"]["tokens"] < 0.5 * epoch


MORE = {
    "GRPO": {"method": "grpo", "group_size": 2, "episodes": 32},
    "Online DPO": {"method": "online_dpo", "episodes": 32},
}


@pytest.mark.parametrize("on_gpu", [False, True])
def test_what_does_not_fit_is_said_with_the_field_to_change(bench, tmp_path, monkeypatch, on_gpu):
    """And the recipe takes what it says."""
    own = empty(bench, tmp_path)
    recipe = yaml.safe_load(own.recipe.read_text())
    recipe["policies"] |= MORE
    own.recipe.write_text(json.dumps(recipe))  # every engine its own, none an alias
    from flows.commands.plan import plan_recipe
    from tasks.planning import speed as plan_speed

    small = replace(plan_speed.Speed.of(str(own.workspace)), memory_bytes=2**20, on_gpu=on_gpu)
    monkeypatch.setattr("tasks.planning.plan.Speed.of", lambda _: small)
    told = plan_recipe(load_recipe(str(own.recipe), []))
    sections = {"prepare-sft": "sft"} | {
        f"train-{policy['method']} {name}": f"policies.{name}" for name, policy in recipe["policies"].items()
    }
    lacking = [line for line in told.warnings if "GiB and this machine has" in line]
    stages = [line.partition(" needs ")[0] for line in lacking]
    assert stages == list(sections)
    for stage, line in zip(stages, lacking, strict=True):
        # Of the stage's own section.
        advice = line.partition(": ")[2].replace(f"{sections[stage]}.", "OWN.")
        fields = re.findall(r"[A-Za-z_]+(?:\.[a-z_]+)+", advice)
        assert on_gpu <= bool(fields)
        assert {field.partition(".")[0] for field in fields} <= {"OWN"}
        for change in re.findall(r"set OWN(\S+=true)", advice):
            load_recipe(str(own.recipe), [sections[stage] + change.rstrip(",")])
        for field, highest in re.findall(r"OWN(\S+\.zero_stage) \(to (\d) at most", advice):
            load_recipe(str(own.recipe), [f"{sections[stage]}{field}={highest}"])
    assert on_gpu == any("train-grpo" in line and "(to 2 at most)" in line for line in told.warnings)
    assert on_gpu == any("train-dpo DPO" in line and "(to 3 at most)" in line for line in told.warnings)


def test_the_table_and_a_mistake(bench, tmp_path):
    own = empty(bench, tmp_path)
    done = own.dpo("plan", str(own.recipe))
    assert done.returncode == 0, done.stderr
    for part in (
        "Plan of tiny",
        "train-dpo DPO",
        "runs: never ran here",
        "Peak memory",
        "estimate: pairs are not",
    ):
        assert part in done.stdout
    assert not own.workspace.exists()
    databases = [path for path in tmp_path.rglob("*") if path.suffix in {".db", ".sqlite"}]
    assert databases == [], "neither Prefect's server nor MLflow's database was started"
    with pytest.raises(ModelError, match="no model at /nowhere"):
        planned(own, "--set", "model.name=/nowhere")
    assert not own.workspace.exists()
