"""Downloads that break in the middle: said, nothing half is used, and the next try succeeds."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import yaml

from tests.scenarios.faults.hub import Hub
from tests.support.runs.tiny_run import Bench

pytestmark = pytest.mark.faults


@pytest.fixture
def hub(bench: Bench, tmp_path: Path) -> Iterator[Hub]:
    """With the tiny model."""
    with Hub(tmp_path / "hub") as hub:
        model = hub.folder("models", "me/tiny")
        model.parent.mkdir(parents=True)
        recipe = yaml.safe_load(bench.recipe.read_text())
        os.symlink(recipe["model"]["name"], model)
        yield hub


def ask(hub: Hub, tmp_path: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own, which knows no hub but this one."""
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
    repository = str(Path(__file__).parents[3])
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | own | {"PYTHONPATH": repository, "HF_HUB_DISABLE_XET": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def assert_told(broken: subprocess.CompletedProcess[str], name: str) -> None:
    """An error for people, with exit code 2, that names what was asked for."""
    assert broken.returncode == 1, broken.stdout
    assert broken.stderr.splitlines()[-1].startswith("2 "), broken.stderr
    assert name in broken.stderr


MODEL = """
import sys
from pathlib import Path
from dpo_core.errors import DpoError
from dpo_core.models.load import ModelConfig, convert, locate
config = ModelConfig(name="me/tiny")
try:
    print(locate(config))
    convert(config, Path("out"))
except DpoError as error:
    sys.exit(f"{error.exit_code} {error}")
"""


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_model_whose_download_breaks(hub: Hub, tmp_path: Path, file: str) -> None:
    hub.cut = {file}
    broken = ask(hub, tmp_path, MODEL)
    assert_told(broken, "me/tiny")
    assert "the download of me/tiny from the hub failed" in broken.stderr
    assert "run again" in broken.stderr
    assert not (tmp_path / "out").exists()
    assert f"{file} cut from 0" in hub.sent
    hub.cut, hub.sent = set(), []
    whole = ask(hub, tmp_path, MODEL)
    assert whole.returncode == 0, whole.stderr
    source = hub.folder("models", "me/tiny")
    for path in Path(whole.stdout.splitlines()[0]).iterdir():
        assert path.read_bytes() == (source / path.name).read_bytes()
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert not list((tmp_path / "hf").rglob("*.incomplete")) or "from 0" in str(hub.sent)


def test_a_name_that_the_hub_does_not_know(hub: Hub, tmp_path: Path) -> None:
    unknown = ask(hub, tmp_path, MODEL.replace("me/tiny", "me/unknown"))
    assert unknown.returncode == 1
    assert "Check the name" in unknown.stderr
    assert "the download" not in unknown.stderr


DATA = """
import sys
from dpo_core.data.files.read import read_rows
from dpo_core.errors import DpoError
try:
    print(sum(len(rows) for _, rows in read_rows("me/pairs")))
except DpoError as error:
    sys.exit(f"{error.exit_code} {error}")
"""


@pytest.mark.parametrize("name", ["train.jsonl", "train.parquet"])
def test_a_data_set_whose_download_breaks(hub: Hub, tmp_path: Path, name: str) -> None:
    path = hub.folder("datasets", "me/pairs") / name
    path.parent.mkdir(parents=True)
    rows = pd.DataFrame({"prompt": [f"Question {n}?" for n in range(500)], "chosen": "yes", "rejected": "no"})
    if path.suffix == ".parquet":
        rows.to_parquet(path)
    else:
        rows.to_json(path, orient="records", lines=True)
    hub.cut = {path.name}
    broken = ask(hub, tmp_path, DATA)
    assert_told(broken, "me/pairs")
    assert "peer closed connection" in broken.stderr
    assert "the network" in broken.stderr
    assert f"{path.name} cut from 0" in hub.sent
    hub.cut, hub.sent = set(), []
    whole = ask(hub, tmp_path, DATA)
    assert whole.returncode == 0, whole.stderr
    assert whole.stdout.split() == ["500"]
