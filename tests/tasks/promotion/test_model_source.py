"""Models by name: registered versions and policies of runs, on a real registry and a real run."""

import json
import shutil
import tarfile
from pathlib import Path

import pytest

from dpo_core.errors import RecipeError, StageFailed
from dpo_core.models.config import ModelConfig
from dpo_core.models.source import weights_digest
from tasks.preflight import check_before_run
from tasks.promotion.model_source import as_folder, find_champion, pinned_name, resolve
from tasks.promotion.promote import promote, rollback
from tasks.recipe.read import load_recipe
from tasks.recipe.sections import TrackingConfig
from tasks.runs.recipe import with_models
from tasks.runs.record import RunRecord, save_run
from tasks.store.manifest import digest_folder
from tasks.store.store import Store
from tasks.tracking.registry import register_model
from tasks.tracking.tracker import Tracker
from tests.support.runs.promotions import NAME, World, dpo_killed

ARCHIVE = Path(__file__).parents[2] / "support" / "golden" / "tiny-run.tar.xz"
RUN = "tiny-20261129-135531"


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with one finished run: SFT, DPO, PPO."""
    folder = tmp_path_factory.mktemp("ran")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    # The archive is of an earlier version, whose reports are not read.
    path = folder / "runs" / "runs" / RUN / "report.json"
    report = json.loads(path.read_bytes())
    del report["objective"]
    report |= {"candidate": "DPO", "reference_stage": "prepare-sft", "policies": {}}
    for method in ("dpo", "ppo"):
        made_by = {"stage": f"train-{method}", "start": "SFT", "reference": "SFT"}
        report["policies"][method.upper()] = {"method": method, "words": method, **made_by}
    path.write_text(json.dumps(report))
    return folder / "runs"


def test_an_alias_and_a_number_name_a_version(world: World) -> None:
    report = world.run("first")
    world.run("second", f"{NAME} version 1")
    assert report.model
    by_number = resolve(f"models:/{NAME}/1", world.workspace, world.tracker)
    assert by_number.path == world.workspace / "weights" / "first"
    assert by_number.origin.sha256 == report.model.sha256 == digest_folder(by_number.path)
    assert by_number.manifest.extra["weights_sha256"] == weights_digest(by_number.path)
    assert by_number.origin.sentence == f"{NAME} version 1, trained by the run first"
    challenger = resolve(f"models:/{NAME}@challenger", world.workspace, world.tracker)
    assert challenger.origin.name == f"models:/{NAME}/2"
    assert challenger.origin.sentence == f"{NAME} version 2 (challenger), trained by the run second"


def test_the_champion_is_whom_promotions_made_it(world: World) -> None:
    name = f"models:/{NAME}@champion"

    def champion() -> str:
        registered = find_champion(world.tracker, NAME)
        assert registered
        assert registered.title == f"{NAME} version {pinned_name(name, world.workspace, world.tracker)[-1]}"
        return pinned_name(name, world.workspace, world.tracker)

    world.run("first")
    promote(world.workspace, "first")
    assert champion() == f"models:/{NAME}/1"
    world.run("second", f"{NAME} version 1")
    killed = dpo_killed(
        "promote", "second", "--workspace", str(world.workspace), folder=world.workspace, before_write=2
    )
    assert killed.code == -9, killed.said
    assert champion() == f"models:/{NAME}/2", "the change is written down"
    assert world.aliases()["champion"] == "1", "the alias is not, and looking does not write it"
    rollback(world.workspace, NAME)
    assert champion() == f"models:/{NAME}/1"
    world.client.set_registered_model_alias(NAME, "champion", "2")  # by hand
    assert champion() == f"models:/{NAME}/2"


def test_what_is_not_there_is_said_with_what_is(world: World) -> None:
    def refused(name: str) -> str:
        with pytest.raises(RecipeError) as error:
            resolve(name, world.workspace, world.tracker)
        return str(error.value)

    nightly = refused("models:/dpo-nightly@champion")
    assert "has no model dpo-nightly, so it has no champion yet" in nightly
    assert "Start the first run from a base model (--set model.name=…)" in nightly
    world.run("first")
    assert "has no model dpo-tony. Did you mean dpo-tiny? Registered models: dpo-tiny" in refused(
        "models:/dpo-tony/1"
    )
    assert refused(f"models:/{NAME}@champion").startswith(f"{NAME} has no champion yet. Start the first run")
    promote(world.workspace, "first")
    assert "has no alias champoin. Did you mean champion?" in refused(f"models:/{NAME}@champoin")
    assert refused(f"models:/{NAME}/7") == f"{NAME} has no version 7. Its versions: 1"
    for name in ("models:/", f"models:/{NAME}", f"models:/{NAME}@", f"models:/{NAME}/", "models:/@x"):
        assert "is not the name of a registered version. Write models:/NAME@ALIAS" in refused(name)
    with pytest.raises(RecipeError, match=r"model\.revision has no effect"):
        as_folder(ModelConfig(name=f"models:/{NAME}/1", revision="main"), world.workspace, world.tracker)


def test_files_that_are_not_those_that_were_registered_are_refused(world: World) -> None:
    world.run("first")
    name, folder = f"models:/{NAME}/1", world.workspace / "weights" / "first"
    (folder / "model.safetensors").write_text("other")
    with pytest.raises(RecipeError, match=f"{NAME} version 1 is damaged.*Run its recipe again"):
        resolve(name, world.workspace, world.tracker)
    assert resolve(name, world.workspace, world.tracker, verify=False).path == folder
    shutil.rmtree(folder)
    with pytest.raises(
        RecipeError, match=f"{NAME} version 1 are not on this machine: file:.*train it again, .*the run first"
    ):
        resolve(name, world.workspace, world.tracker, verify=False)
    version = world.client.create_model_version(NAME, "file:///elsewhere")
    with pytest.raises(RecipeError, match="version 2 was not registered by a run"):
        resolve(f"models:/{NAME}/{version.version}", world.workspace, world.tracker)
    world.run("third")
    reward = Store(world.workspace).object("reward-model", "a" * 64)
    register_model(world.tracker, "scores", str(reward), tags={"dpo.artifact_sha256": "a" * 64})
    with pytest.raises(RecipeError, match=r"scores version 1 is a reward model\. Name a language model"):
        resolve("models:/scores/1", world.workspace, world.tracker)


def test_policies_of_a_run_are_models(ran: Path) -> None:
    store = Store(ran)

    def folder_of(stage: str) -> Path:
        (manifest,) = store.history(stage)
        return manifest.path

    own = resolve(f"runs:/{RUN}", ran)
    assert own.path == folder_of("train-dpo")
    assert own.origin.name == f"runs:/{RUN}/DPO"
    assert own.origin.sentence == f"DPO of the run {RUN}"
    assert resolve("runs:/latest", ran).origin == own.origin
    assert resolve(f"runs:/{RUN}/ppo", ran).path == folder_of("train-ppo")
    assert resolve("runs:/latest/SFT", ran).path == folder_of("prepare-sft")
    with pytest.raises(RecipeError, match=f"{RUN} has no policy GRPO. Its policies: SFT, DPO, PPO"):
        resolve(f"runs:/{RUN}/GRPO", ran)
    with pytest.raises(RecipeError, match=f"no run named {RUN[:-1]}. Did you mean {RUN}"):
        resolve(f"runs:/{RUN[:-1]}", ran)
    with pytest.raises(RecipeError, match=r"no run named \.\."):
        resolve("runs:/../runs", ran)


def test_a_run_whose_model_is_gone_or_that_has_not_finished_is_refused(ran: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="has no finished run"):
        resolve("runs:/latest", tmp_path)
    own = shutil.copytree(ran, tmp_path / "runs")
    path = resolve(f"runs:/{RUN}", own).path
    assert path.is_relative_to(own), "a workspace may be moved"
    (path / "config.json").write_text("{}")
    with pytest.raises(RecipeError, match=r"DPO of the run .* is damaged"):
        resolve(f"runs:/{RUN}", own)
    shutil.rmtree(path)
    with pytest.raises(RecipeError, match=r"is missing.* Run again: dpo run"):
        resolve(f"runs:/{RUN}", own)
    record = RunRecord.model_validate_json((own / "runs" / RUN / "run.json").read_bytes())
    save_run(own, record.model_copy(update={"status": "failed"}))
    with pytest.raises(RecipeError, match="is not finished: its status is failed"):
        resolve(f"runs:/{RUN}", own)


def test_a_recipe_with_an_unknown_model_is_refused_before_a_run_and_leaves_no_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    recipe = load_recipe("demo", [f"workspace={tmp_path}", "model.name=models:/dpo-nightly@champion"])
    with pytest.raises(RecipeError, match=r"has no champion yet.*promote what it registers") as error:
        check_before_run(recipe)
    assert error.value.exit_code == 2
    with pytest.raises(RecipeError, match="has no run named nobody"):
        check_before_run(load_recipe("demo", [f"workspace={tmp_path}", "model.name=runs:/nobody"]))
    assert list(tmp_path.iterdir()) == []


def test_an_mlflow_that_is_away_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.tracking.tracker.START_PATIENCE", 0.1)
    tracker = Tracker(TrackingConfig(uri="http://127.0.0.1:9"), tmp_path)
    with pytest.raises(StageFailed, match=r"MLflow at http://127\.0\.0\.1:9 does not answer"):
        resolve("models:/dpo-tiny@champion", tmp_path, tracker)


def test_a_resumed_run_goes_on_with_the_version_that_it_began_with(world: World) -> None:
    world.run("first")
    promote(world.workspace, "first")
    name = f"models:/{NAME}@champion"
    recipe = load_recipe("demo", [f"workspace={world.workspace}", f"model.name={name}"])
    models = {name: pinned_name(name, world.workspace, world.tracker)}
    world.run("second", f"{NAME} version 1")
    promote(world.workspace, "second")
    assert pinned_name(name, world.workspace, world.tracker) == f"models:/{NAME}/2"
    assert with_models(recipe, models).model.name == f"models:/{NAME}/1"
    assert with_models(recipe, {}) == recipe
