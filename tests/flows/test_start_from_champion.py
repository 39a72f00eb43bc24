"""Tonight's run starts from yesterday's champion: whose weights it takes, and what its page says of them."""

import json
from pathlib import Path

import pytest

from dpo_core.errors import RecipeError
from flows.commands.plan import plan_recipe
from tasks.recipe.read import load_recipe
from tasks.recipe.sections import TrackingConfig
from tasks.store.manifest import digest_folder
from tasks.tracking.registry import register_model
from tasks.tracking.tracker import Tracker
from tests.support.runs.tiny_run import ENGINE, Bench

CHAMPION = "models:/dpo-tiny@champion"
SETTINGS = {"epochs": 50, "max_steps": 1, "batch_size": 8, "micro_batch_size": 8, "engine": ENGINE}
POLICIES = {"DPO": {"method": "dpo", "start": CHAMPION} | SETTINGS}
SMALL = ("sft={enabled: false}", f"policies={json.dumps(POLICIES)}")


def sets(model: str) -> list[str]:
    return [part for one in (*SMALL, f"model.name={model}") for part in ("--set", one)]


def import_state(bench: Bench, model: str) -> str:
    """Whether a run from this model would import it."""
    uri = f"tracking.uri=sqlite:///{bench.workspace}/mlflow.db"
    plan = plan_recipe(load_recipe(str(bench.recipe), [*SMALL, f"model.name={model}", uri]))
    return next(row.state for row in plan.stages if row.name == "import-model")


def made_by(report: dict, policy: str) -> Path:
    """The model of a policy."""
    name = report["policies"][policy]["stage"]
    (uri,) = (stage["uri"] for stage in report["stages"] if stage["name"] == name)
    return Path(uri.removeprefix("file://"))


@pytest.fixture(scope="module")
def promoted(finished: tuple[Bench, dict]) -> tuple[Bench, dict]:
    """A workspace whose run was promoted."""
    bench, first = finished[0].copy("promoted-first"), finished[1]
    done = bench.dpo("promote", first["run"]["name"], "--force", "--reason", "a test")
    assert done.returncode == 0, done.stderr
    return bench, first


@pytest.fixture(scope="module")
def nightly(promoted: tuple[Bench, dict]) -> tuple[Bench, dict, dict]:
    """A promoted run, and one that started from its model."""
    bench, first = promoted
    return bench, first, bench.run(*sets(CHAMPION))


@pytest.mark.slow  # test_unpaired_run has a run from a champion too
def test_the_run_starts_from_the_champion_and_says_so(nightly: tuple[Bench, dict, dict]) -> None:
    bench, first, second = nightly
    name = first["run"]["name"]
    stages = {stage["name"]: stage for stage in second["stages"]}
    imported = Path(stages["import-model"]["uri"].removeprefix("file://")) / "model.safetensors"
    assert imported.read_bytes() == (made_by(first, "DPO") / "model.safetensors").read_bytes()
    version = f"dpo-tiny version {first['model']['version']}"
    words = f"{version} (champion), trained by the run {name}"
    assert second["trained"]["base_model"].startswith(words)
    origin = second["trained"]["started_from"]
    assert (origin["name"], origin["run"]) == (f"models:/dpo-tiny/{first['model']['version']}", name)
    assert origin["sha256"] == first["model"]["sha256"]
    assert stages[f"import-model {origin['name']}"]["state"] == "cached", "the policy starts from it too"
    entry = next((bench.workspace / "store/index/import-model").glob(f"{_key(bench, second)}.json"))
    assert json.loads(entry.read_text())["manifest"]["extra"]["started_from"] == origin
    folder = bench.workspace / "runs" / second["run"]["name"]
    page = (folder / "page.html").read_text()
    assert page.count(words) >= 2, "what was trained, and the lineage"
    assert f"name: {origin['name']}" in (folder / "recipe.yaml").read_text(), "what reproduces the run"
    tags = _tracker(bench).ask(
        "tags", lambda client: client.get_run(second["run"]["mlflow_run_id"]).data.tags
    )
    assert tags["dpo.base_model"].startswith(words)


@pytest.mark.slow  # two more whole runs
def test_other_weights_are_imported_and_the_same_by_another_name_are_not(
    nightly: tuple[Bench, dict, dict],
) -> None:
    bench, first, second = nightly
    run, version = first["run"]["name"], first["model"]["version"]
    tracker = _tracker(bench)

    def make_champion(policy: str) -> None:
        folder = made_by(first, policy)
        tracker.run_id = second["run"]["mlflow_run_id"]
        tags = {"dpo.artifact_sha256": digest_folder(folder)}
        register_model(tracker, "dpo-tiny", folder, alias="champion", tags=tags)

    for name in (CHAMPION, f"models:/dpo-tiny/{version}", f"runs:/{run}", f"runs:/{run}/dpo"):
        assert import_state(bench, name) == "cached"
    make_champion("PPO")
    assert import_state(bench, CHAMPION) == "runs"
    make_champion("DPO")
    assert import_state(bench, CHAMPION) == "cached", "the weights of the first version, as another one"
    assert import_state(bench, f"runs:/{run}/ppo") == "runs"
    assert import_state(bench, "runs:/latest") == "runs", "the model of the second run"

    # The alias has moved, and a resume goes on with the version that the run began with.
    make_champion("PPO")
    again = bench.run(*sets(CHAMPION), "--resume", second["run"]["name"])
    ran = {name for name, state in bench.states(again).items() if state == "ran"}
    assert ran == {"evaluate"}, "held against the new champion, and not trained again"
    assert again["trained"] == second["trained"]


def test_names_of_nothing_are_refused_before_a_run(promoted: tuple[Bench, dict]) -> None:
    bench, first = promoted
    assert import_state(bench, CHAMPION) == "runs"
    runs = sorted((bench.workspace / "runs").iterdir())
    for model, words in {
        "models:/dpo-tiny@champoin": "dpo-tiny has no alias champoin. Did you mean champion?",
        f"runs:/{first['run']['name']}/GRPO": "has no policy GRPO. Its policies: SFT, DPO, PPO",
    }.items():
        with pytest.raises(RecipeError) as error:
            import_state(bench, model)
        assert words in str(error.value)
        done = bench.dpo("run", str(bench.recipe), *sets(model))
        assert (done.returncode, words in done.stderr) == (2, True), done.stderr
    assert sorted((bench.workspace / "runs").iterdir()) == runs


def _tracker(bench: Bench) -> Tracker:
    return Tracker(TrackingConfig(uri=f"sqlite:///{bench.workspace}/mlflow.db"), bench.workspace)


def _key(bench: Bench, report: dict) -> str:
    lines = (bench.workspace / "runs" / report["run"]["name"] / "stages.jsonl").read_text().splitlines()
    return next(line["key"] for line in map(json.loads, lines) if line["stage"] == "import-model")
