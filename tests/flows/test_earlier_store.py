"""A workspace of an earlier version is still read: its artifacts, its records, its stage keys.

`tiny-run.tar.xz` is the workspace of a run of the tiny recipe at commit f98fa62, with model, recipe and
reward beside it, all named by relative paths; MLflow's database, Data Docs and locks are left out.
"""

import json
import tarfile
from pathlib import Path

import pytest
import yaml

from tasks.store.store import Store
from tests.support.runs.stored import assert_clean
from tests.support.runs.tiny_run import Bench, tiny_recipe

ARCHIVE = Path(__file__).parents[1] / "support" / "golden" / "tiny-run.tar.xz"
RUN = "tiny-20261129-135531"
STAGES = {
    "load-data", "import-model", "validate-prompts", "prepare-sft", "sample-pairs", "validate-pairs",
    "cache-reference", "train-dpo", "train-ppo", "evaluate",
}  # fmt: skip


@pytest.fixture(scope="module")
def earlier(bench: Bench) -> Bench:
    folder = bench.folder.parent / "earlier"
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return Bench(folder)


def test_the_store_is_whole_and_the_run_is_listed(earlier: Bench) -> None:
    assert {key.partition("/")[0] for key in earlier.index()} == STAGES
    assert_clean(Store(earlier.workspace))
    listed = earlier.dpo("runs", "--json")
    assert [run["run_id"] for run in json.loads(listed.stdout)] == [RUN], listed.stderr
    shown = earlier.dpo("show", RUN)
    assert f"of another version. Run again: dpo run RECIPE --resume {RUN}" in shown.stderr
    freed = json.loads(earlier.dpo("gc", "--dry-run", "--json").stdout)
    assert freed["removed"] == []
    assert (freed["kept"][0]["what"], freed["kept"][0]["why"]) == (f"run {RUN}", "newest")


def test_a_run_with_the_same_settings_finds_its_stages_done(earlier: Bench) -> None:
    recipe = tiny_recipe(Path("model"), Path("runs")) | {"reward": {"source": "vowels.py:vowels"}}
    earlier.recipe.write_text(yaml.safe_dump(recipe))
    before = earlier.index()
    report = earlier.run()
    assert set(earlier.states(report).values()) == {"cached"}
    assert earlier.index() == before
