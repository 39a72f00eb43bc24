"""The table of bad inputs (tests/bad_inputs), run through the real command line, Prefect and MLflow.

Each case differs from a recipe that runs to its end by one fault, and must leave: its exit code, one line of
error with the words given, no traceback, and the artifact store as it was.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.scenarios.bad_inputs import (
    CASES,
    World,
    data,
    dpo,
    good_rows,
    lines,
    machine,
    models,
    recipes,
    stage_of,
    unpaired,
)
from tests.support.models.tiny import make_tiny_model
from tests.support.runs import forked
from tests.support.runs.tiny_run import prefect_address

REPO = Path(__file__).resolve().parents[3]
TABLE = (recipes, data, unpaired, models, machine)  # importing them fills it


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A workspace with one good run."""
    folder = tmp_path_factory.mktemp("bad")
    settings = {"PREFECT_HOME": str(folder / "prefect"), "CUDA_VISIBLE_DEVICES": "", "TMPDIR": str(folder)}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        patch.setattr(tempfile, "tempdir", None)  # read TMPDIR again
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setenv("PREFECT_API_URL", prefect_address())
        from prefect.context import refresh_global_settings_context

        refresh_global_settings_context()
        made = World(folder, make_tiny_model(folder / "model"))
        (folder / "good.jsonl").write_text(lines(good_rows()))
        done = dpo(*made.run("--json"))
        assert done.code == 0, done.err
        yield made
    refresh_global_settings_context()


@pytest.mark.parametrize("name", CASES)
def test_bad_input(world: World, name: str) -> None:
    case = CASES[name]
    arguments = case.make(world)
    before = world.store()
    done = dpo(*arguments)
    assert done.code == case.code, done.err + done.out
    if case.usage:
        said = " ".join(done.err.replace("│", " ").split())
    else:
        assert len(done.errors) == 1, done.err
        said = done.errors[0]
    for word in case.words:
        assert word in said
    assert "Traceback" not in done.err + done.out
    may_resume = case.code == 4 and "without --resume" not in done.err
    assert ("to resume: dpo run" in done.err) is may_resume
    after = world.store()
    assert {path: after.get(path) for path in before} == before
    added = {stage_of(path) for path in after.keys() - before.keys()} - {None}
    assert added == case.adds, "only stages before the failing one may leave an artifact"
    assert world.unfinished() == []


@pytest.mark.parametrize("all_stages", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_rows_of_ones_own_run_to_the_end(world: World, all_stages: bool) -> None:
    rows = [
        {"prompt": "How was the soup?", "chosen": " Good and warm.", "rejected": " Cold and bad."},
        {"prompt": "And the bread?", "chosen": " Fresh, and very good.", "rejected": " Stale."},
    ]
    small = {"batch_size": 2, "micro_batch_size": 2}
    more: dict[str, Any] = {
        "sft": {"enabled": True, "engine": {"threads": 1}},
        "reward": {"source": None, "model": small},
        "policies": {"PPO": {"method": "ppo", "iterations": 1, "episodes": 4, "micro_batch_size": 4}},
    }
    changes = {"evaluate": {"samples_per_prompt": 2}} | (more if all_stages else {})
    done = dpo(*world.run_on(rows, "--json", name="two", **changes))
    assert done.code == 0, done.err
    report = json.loads(done.out)
    ran = [stage["name"] for stage in report["stages"]]
    stages = {"load-data", "import-model", "validate-pairs", "cache-reference", "train-dpo DPO", "evaluate"}
    assert set(ran) == stages | ({"prepare-sft", "train-reward", "train-ppo PPO"} if all_stages else set())
    findings = {f["rule"]: f for f in report["gate"][0]["findings"]}
    assert findings["pairs/too_few"]["passed"] is False
    assert findings["pairs/too_few"]["severity"] == "warning"
    assert [row["name"] for row in report["evaluation"]["policies"]][-2:] == (
        ["DPO", "PPO"] if all_stages else ["SFT", "DPO"]
    )


# --- in a process of its own ------------------------------------------------------------------------------


def _process(arguments: list[str], *before: str) -> subprocess.CompletedProcess[str]:
    command = [*before, sys.executable, "-m", "flows.cli.main", *arguments]
    return subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=600, check=False)


def _without_override() -> list[str]:
    """Words that take from root the right to ignore permissions; nothing for other users."""
    if os.geteuid() != 0:
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("as root this needs setpriv, to give up the right to ignore permissions")
    caps = "-dac_override,-dac_read_search"
    return ["setpriv", f"--bounding-set={caps}", f"--inh-caps={caps}"]


@pytest.mark.parametrize(
    "what", ["recipe", *(pytest.param(w, marks=pytest.mark.slow) for w in ("data", "model"))]
)
def test_no_permission(world: World, what: str) -> None:
    before, words = _without_override(), {
        "recipe": "the recipe {} cannot be read (Permission denied). Check its path",
        "data": "{} is not readable (permission denied). Give this user read access",
        "model": "{} cannot be read",
    }  # fmt: skip
    if what == "data":
        arguments = world.validate("rows.jsonl", lines(good_rows()))
        place = Path(arguments[1])
    elif what == "model":
        place = Path(world.changed_model(lambda model: None)) / "config.json"
        arguments = world.run(model={"name": str(place.parent)})
    else:
        arguments = world.run()
        place = Path(arguments[1])
    place.chmod(0)
    try:
        done = _process(arguments, *before)
    finally:
        place.chmod(0o700)
    assert done.returncode == 2, done.stderr
    (error,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert words[what].format(place) in error
    assert "Traceback" not in done.stderr


def test_prefect_that_does_not_answer(world: World) -> None:
    before = world.store()
    away = {"PREFECT_API_URL": "http://127.0.0.1:9/api", "PREFECT_CLIENT_MAX_RETRIES": "0"}
    done = forked.dpo(world.run(), env=os.environ | away, cwd=REPO)
    assert done.returncode == 2, done.stderr
    (error,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert "the Prefect API at http://127.0.0.1:9/api does not answer" in error
    assert "unset PREFECT_API_URL" in error
    assert "Traceback" not in done.stderr
    assert world.store() == before
