"""A whole run of a model whose architecture comes as code beside its weights, through the command line."""

import json
from pathlib import Path

import pytest
import yaml

from tests.support.models.families import with_own_code
from tests.support.models.tiny import make_tiny_model
from tests.support.runs.tiny_run import ENGINE, Bench, tiny_recipe

pytestmark = pytest.mark.slow

REWARD = {"max_steps": 2, "batch_size": 8, "micro_batch_size": 8, "engine": ENGINE}


def test_every_stage_reads_the_code_that_the_recipe_trusts(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    model = with_own_code(make_tiny_model(tmp_path / "model", taught=True))
    recipe = tiny_recipe(model, folder / "runs")
    recipe["reward"]["model"] = REWARD
    recipe["policies"]["PPO"]["reward"] = "model"
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    bench = Bench(folder)
    refused = bench.dpo("run", str(bench.recipe))
    assert refused.returncode == 2
    assert "contains custom code" in refused.stderr
    recipe["model"]["trust_remote_code"] = True
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    report = bench.run()
    states = bench.states(report)
    assert {"train-reward", "train-ppo PPO", "train-dpo DPO", "evaluate"} <= set(states)
    for stage in report["stages"]:
        written = Path(stage["uri"].removeprefix("file://"))
        if stage["name"] in {"import-model", "prepare-sft", "train-dpo DPO", "train-ppo PPO"}:
            assert (written / "modeling_own.py").is_file(), stage["name"]
            assert json.loads((written / "config.json").read_text())["architectures"] == ["OwnForCausalLM"]
    assert set(bench.states(bench.run()).values()) == {"cached"}, "also where the import is not run again"
    assert bench.dpo("plan", str(bench.recipe)).returncode == 0
