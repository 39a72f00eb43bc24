"""The whole run on single answers labelled desirable or not, which starts from the champion of another."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient

from tests.support.runs.tiny_run import ENGINE, Bench

STAGES = [
    "load-data",
    "import-model",
    "validate-unpaired",
    "prepare-sft",
    "cache-reference",
    "train-kto KTO",
    "train-ppo PPO",
    "evaluate",
]
CHAMPION = "models:/dpo-tiny@champion"
SIZES = {"epochs": 50, "max_steps": 3, "batch_size": 8, "micro_batch_size": 8, "engine": ENGINE}


def labelled(count: int = 36) -> list[dict[str, Any]]:
    """Two of three are desirable."""
    answers = (" cold and bad.", " good and warm.", " happy and wonderful.")
    return [
        {
            "prompt": f"The soup of day {i} was",
            "completion": f"{answers[i % 3]} Number {i}.",
            "label": i % 3 > 0,
        }
        for i in range(count)
    ]


def recipe_for(bench: Bench, rows: list[dict[str, Any]], name: str, **kto: Any) -> dict[str, Any]:
    """The tiny recipe on rows of one's own."""
    data = bench.folder / f"{name}.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    recipe = yaml.safe_load(bench.recipe.read_text())
    recipe |= {
        "name": name,
        "data": {"path": str(data), "eval_fraction": 0.2},
        "sft": {"batch_size": 8, "micro_batch_size": 8, "engine": ENGINE},
    }
    ppo = recipe["policies"]["PPO"]
    recipe["policies"] = {"KTO": {"method": "kto", **SIZES, **kto}, "PPO": ppo}
    recipe.pop("pairs", None)
    return recipe


def stage(report: dict[str, Any], name: str) -> Path:
    return Path(next(s["uri"] for s in report["stages"] if s["name"] == name).removeprefix("file://"))


@pytest.fixture(scope="module")
def unpaired(finished: tuple[Bench, dict[str, Any]]) -> tuple[Bench, dict[str, Any]]:
    """A workspace of its own after one whole KTO run from the promoted model, and its report."""
    own, first = finished[0].copy("unpaired"), finished[1]
    done = own.dpo("promote", first["run"]["name"], "--force", "--reason", "a test")
    assert done.returncode == 0, done.stderr
    own.recipe.write_text(yaml.safe_dump(recipe_for(own, labelled(), "kto") | {"model": {"name": CHAMPION}}))
    return own, own.run()


def test_every_stage_runs(unpaired: tuple[Bench, dict[str, Any]]) -> None:
    bench, report = unpaired
    assert [s["name"] for s in report["stages"]] == STAGES
    ran = {name for name, state in bench.states(report).items() if state == "ran"}
    assert ran >= set(STAGES) - {"import-model"}, "the finished run has imported the model"
    (gate,) = report["gate"]
    assert gate["subject"] == "unpaired"
    policies = {row["name"]: row for row in report["evaluation"]["policies"]}
    assert list(policies) == ["SFT", "KTO", "PPO"]
    assert policies["KTO"]["accuracy"] is None
    assert policies["KTO"]["gain"]["low"] <= policies["KTO"]["gain"]["value"]
    assert report["model"]["alias"] == "challenger"
    # It does not look like a DPO run.
    folder = bench.workspace / "runs" / report["run"]["name"]
    objective = "kto, beta 0.1, desirable_weight 1, undesirable_weight 1"
    assert report["trained"]["objective"] == objective
    client = MlflowClient(f"sqlite:///{bench.workspace / 'mlflow.db'}")
    version = client.get_model_version(report["model"]["name"], report["model"]["version"])
    assert version.tags["dpo.objective"] == objective
    parent = client.get_run(report["run"]["mlflow_run_id"])
    assert parent.data.tags["dpo.objective"] == objective
    texts = [(folder / name).read_text() for name in ("page.html", "summary.md")]
    for text in (*texts, version.description, parent.data.tags["mlflow.note.content"]):
        flat = text.replace("\\", "")
        assert objective in flat
        assert "DPO" not in flat
        rows = report["trained"]["rows_trained"]
        assert f"kto.jsonl; {rows} rows trained on, {36 - rows} held out" in flat
        assert "3 steps, batches of 8, learning rate 1e-05" in flat
        assert "vowels, which PPO also learned from: a gain may not carry over to other measures" in flat


def test_it_started_from_the_champion_and_says_so(unpaired, finished) -> None:
    (bench, report), first = unpaired, finished[1]
    version, run = first["model"]["version"], first["run"]["name"]
    words = f"dpo-tiny version {version} (champion), trained by the run {run}"
    assert report["trained"]["base_model"].startswith(words)
    origin = report["trained"]["started_from"]
    assert (origin["run"], origin["sha256"]) == (run, first["model"]["sha256"])
    trained = next(s for s in first["stages"] if s["name"] == first["policies"]["DPO"]["stage"])
    before, imported = (
        Path(uri.removeprefix("file://")) / "model.safetensors"
        for uri in (trained["uri"], next(s["uri"] for s in report["stages"] if s["name"] == "import-model"))
    )
    assert imported.read_bytes() == before.read_bytes()
    page = (bench.workspace / "runs" / report["run"]["name"] / "page.html").read_text()
    assert page.count(words) >= 2, "what was trained, and the lineage"


def test_it_starts_at_one_half_and_logs_what_unpaired_training_has(unpaired) -> None:
    _, report = unpaired
    first, *_, last = report["curves"]["train-kto KTO"]
    assert first["loss"] == pytest.approx(0.5, abs=1e-5)
    assert first["kl"] == pytest.approx(0, abs=1e-4)
    assert first["count/chosen"] + first["count/rejected"] == 8
    assert last["kl"] >= 0
    assert "rewards/accuracies" not in first


def test_sft_learns_from_the_desirable_answers_only(unpaired) -> None:
    """The share of the training rows that is desirable, once each, is what SFT saw in an epoch."""
    import pandas as pd

    _, report = unpaired
    frame = pd.read_parquet(stage(report, "validate-unpaired") / "data.parquet")
    good = int(frame.loc[frame["split"] == "train", "label"].sum())
    steps = len(report["curves"]["prepare-sft"])
    assert 0 < good < (frame["split"] == "train").sum()
    assert steps == round(good / 8)


def test_the_page_and_the_table_say_what_was_learnt_from(unpaired) -> None:
    bench, report = unpaired
    assert "desirable and" in report["notes"]["Training data"]
    assert "desirable_weight·n_D / (undesirable_weight·n_U) is" in report["notes"]["Class weights"]
    folder = bench.workspace / "runs" / report["run"]["name"]
    page, text = (folder / "page.html").read_text(), (folder / "summary.md").read_text()
    assert "**Class weights**" in text
    assert "Class weights" in page
    assert "| Preference accuracy (implicit reward on held-out pairs) | – | – | – |" in text


@pytest.mark.slow
def test_the_cache_holds_the_mismatched_pairs_for_kto_and_not_for_bco(unpaired) -> None:
    bench, first = unpaired
    facts = json.loads((stage(first, "cache-reference") / "shard" / "shard.json").read_text())
    report = bench.run("--set", "policies.KTO.objective=bco")
    ran = {name for name, state in bench.states(report).items() if state == "ran"}
    assert ran == {"cache-reference", "train-kto KTO", "evaluate"}
    less = json.loads((stage(report, "cache-reference") / "shard" / "shard.json").read_text())
    assert facts["entries"] == 2 * less["entries"]
    assert report["curves"]["train-kto KTO"][0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert "Class weights" not in report["notes"], "BCO has none"


@pytest.mark.slow
def test_a_limit_is_that_of_the_cache_too(unpaired) -> None:
    bench, _ = unpaired
    report = bench.run("--set", "policies.KTO.limit=12")
    ran = {name for name, state in bench.states(report).items() if state == "ran"}
    assert ran == {"cache-reference", "train-kto KTO", "evaluate"}
    assert report["curves"]["train-kto KTO"][0]["loss"] == pytest.approx(0.5, abs=1e-5)


@pytest.mark.slow
def test_pairs_are_taken_apart_for_an_objective_on_single_answers(unpaired) -> None:
    bench, _ = unpaired
    own = bench.copy("apart")
    rows = [
        {"prompt": f"The soup of day {i} was", "chosen": f" good and warm {i}.", "rejected": f" bad {i}."}
        for i in range(30)
    ]
    recipe = recipe_for(own, rows, "apart")
    del recipe["policies"]["PPO"]
    own.recipe.write_text(yaml.safe_dump(recipe))
    done = own.dpo("run", str(own.recipe), "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert "pairs are taken apart, chosen as desirable and rejected as undesirable" in done.stderr
    assert "taken apart" in report["notes"]["Training data"]
    assert "Class weights" not in report["notes"]
    # Pairs stay pairs for the gate and the evaluation.
    assert report["gate"][0]["subject"] == "pairs"
    assert report["evaluation"]["policies"][1]["accuracy"] is not None
    assert report["curves"]["train-kto KTO"][0]["loss"] == pytest.approx(0.5, abs=1e-5)


def test_validate_judges_unpaired_rows(unpaired) -> None:
    bench, _ = unpaired
    rows = labelled()
    rows[3] = rows[4] | {"label": not rows[4]["label"]}
    data = bench.folder / "both.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    done = bench.dpo("validate", str(data), "--json")
    assert done.returncode == 3, done.stderr
    findings = {f["rule"]: f for f in json.loads(done.stdout)["findings"]}
    assert findings["unpaired/contradiction"]["rows"] == [4, 5]
