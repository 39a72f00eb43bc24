"""`--resume` keeps to the settings that a run began with, and a run can be done again."""

import shlex
from pathlib import Path
from typing import Any

import pytest

from dpo_core.errors import RecipeError
from flows.cli.run import show
from flows.commands.evaluate import evaluate
from tasks.recipe.read import load_recipe
from tasks.recipe.recipe import Recipe
from tasks.runs.recipe import (
    differing_settings,
    recipe_path,
    reproducing_command,
    require_same_recipe,
    store_recipe,
)
from tasks.runs.record import RunRecord, new_run, save_run
from tests.support.runs.tiny_run import Bench


@pytest.fixture
def begun(tmp_path: Path, bench: Bench) -> tuple[Path, RunRecord, Recipe]:
    """A workspace with a run that was stopped, and its recipe."""
    sets = ("seed=1", "policies.DPO.objective=simpo", "policies.DPO.parameters.beta=2.5")
    recipe = load_recipe(str(bench.recipe), sets)
    command = shlex.join(["dpo", "run", "my recipe.yaml", *(w for s in sets for w in ("--set", s)), "--json"])
    record = new_run(tmp_path, recipe.name, command)
    record = store_recipe(tmp_path, record, recipe).model_copy(update={"status": "stopped"})
    save_run(tmp_path, record)
    return tmp_path, record, recipe


def test_other_settings_are_refused_field_by_field(
    begun: tuple[Path, RunRecord, Recipe], bench: Bench
) -> None:
    workspace, record, recipe = begun
    require_same_recipe(workspace, record, recipe)
    elsewhere = recipe.model_copy(update={"workspace": "/elsewhere", "description": "another"})
    require_same_recipe(workspace, record, elsewhere)
    plain = load_recipe(str(bench.recipe))
    with pytest.raises(RecipeError) as caught:
        require_same_recipe(workspace, record, plain)
    told = str(caught.value)
    beta, objective = "policies.DPO.parameters.beta", "policies.DPO.objective"
    assert f"the run {record.run_id} was started with seed=1, {objective}=simpo, {beta}=2.5" in told
    assert f"this recipe has seed=0, {objective}=dpo, no {beta}" in told
    path = recipe_path(workspace, record.run_id)
    assert f"Resume with the stored recipe: dpo run {path} --resume {record.run_id}" in told
    assert "start a new run without --resume" in told
    many = load_recipe(str(bench.recipe), ["policies.GRPO={method: grpo}"])
    with pytest.raises(RecipeError, match=r"this recipe has .*policies.GRPO\..* and \d+ more"):
        require_same_recipe(workspace, record, many)


def test_two_runs_are_compared_by_their_settings(
    begun: tuple[Path, RunRecord, Recipe], bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace, record, recipe = begun
    other = new_run(workspace, recipe.name, record.command)
    store_recipe(workspace, other, load_recipe(str(bench.recipe), ["seed=1"]))
    assert differing_settings(workspace, record.run_id, f"runs:/{other.run_id}/DPO") == [
        'policies.DPO.objective: "simpo" -> "dpo"',
        "policies.DPO.parameters.beta: 2.5 -> not set",
    ]
    assert differing_settings(workspace, f"{record.run_id}:DPO", record.run_id) == []
    for unknown in ("models:/dpo-tiny@champion", "/models/gpt2", "some/model", "nobody"):
        assert differing_settings(workspace, record.run_id, unknown) is None
    assert {path.name for path in (workspace / "runs").iterdir()} == {record.run_id, other.run_id}
    evaluate([record.run_id, other.run_id], {}, [], str(workspace), None, as_json=False)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == 'setting policies.DPO.objective: "simpo" -> "dpo"'
    assert printed[-1] == "to compare what the models do, add --suite or --prompts"
    recipe_path(workspace, other.run_id).write_text("seed: [")
    with pytest.raises(RecipeError, match="nothing to evaluate"):
        evaluate([record.run_id, other.run_id], {}, [], str(workspace), None, as_json=False)
    assert "the settings of the runs are not compared" in capsys.readouterr().out


def test_what_was_kept_is_a_recipe_that_does_the_run_again(begun: tuple[Path, RunRecord, Recipe]) -> None:
    workspace, record, recipe = begun
    path = recipe_path(workspace, record.run_id)
    assert load_recipe(str(path)) == recipe.model_copy(update={"workspace": str(workspace)})
    assert reproducing_command(record.command, workspace, record.run_id) == f"dpo run {path}"
    launched = "dpo launch r.yaml --on slurm --set seed=1 --with=nodes=2 --settings s.yaml --resume x"
    again = f"dpo launch {path} --on slurm --with=nodes=2 --settings s.yaml"
    assert reproducing_command(launched, workspace, record.run_id) == again


def test_a_kept_recipe_that_was_changed_is_not_gone_by(begun: tuple[Path, RunRecord, Recipe]) -> None:
    workspace, record, recipe = begun
    path = recipe_path(workspace, record.run_id)
    path.write_text(path.read_text().replace("seed: 1", "seed: 2"))
    with pytest.raises(RecipeError, match="is missing or was changed"):
        require_same_recipe(workspace, record, recipe)
    path.unlink()
    with pytest.raises(RecipeError, match=r"is missing or was changed.*Start a new run without --resume"):
        require_same_recipe(workspace, record, recipe)
    require_same_recipe(workspace, record.model_copy(update={"recipe_sha256": None}), recipe)


def test_the_whole_line_that_resumes_is_shown(begun: tuple[Path, RunRecord, Recipe]) -> None:
    workspace, record, _ = begun
    sets = "--set seed=1 --set policies.DPO.objective=simpo --set policies.DPO.parameters.beta=2.5"
    line = f"dpo run 'my recipe.yaml' {sets}"
    assert record.resume_line == f"{line} --resume {record.run_id}"
    with pytest.raises(RecipeError) as caught:
        show(record.run_id, workspace=str(workspace))
    assert record.resume_line in str(caught.value)
    for typed in ("dpo run a --resume", "dpo run a --resume old", "dpo run a --resume --json", "dpo run a"):
        changed = record.model_copy(update={"command": typed})
        assert changed.resume_line == f"dpo run a --resume {record.run_id}"
    assert record.model_copy(update={"command": ""}).resume_line == f"dpo run tiny --resume {record.run_id}"


def test_a_finished_run_is_resumed_under_its_own_settings_only(
    finished: tuple[Bench, dict[str, Any]],
) -> None:
    bench, report = finished
    own = bench.copy("resumed")
    name, folder = report["run"]["name"], own.workspace / "runs" / report["run"]["name"]
    before = (folder / "run.json").read_bytes(), (folder / "report.json").read_bytes()
    refused = own.dpo("run", str(own.recipe), "--resume", name, "--set", "seed=1")
    assert refused.returncode == 2
    assert f"the run {name} was started with seed=0; this recipe has seed=1" in refused.stderr
    assert before == ((folder / "run.json").read_bytes(), (folder / "report.json").read_bytes())
