"""What a user of the wheel gets: the five packages with their data files, and a command line that works."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built wheel, unpacked as pip would."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    site = folder / "site"
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        archive.extractall(site)
    return site


def test_the_wheel_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    top = {path.name for path in wheel.iterdir() if not path.name.endswith(".dist-info")}
    assert top == {"dpo_core", "expectations", "tasks", "flows", "deploy"}
    assert (wheel / "flows" / "recipes" / "demo.yaml").is_file()
    assert (wheel / "deploy" / "prefect.yaml").is_file()
    assert (wheel / "deploy" / "work_pools" / "kubernetes.json").is_file()
    assert list((wheel / "tasks" / "reports" / "templates").iterdir())
    assert not (wheel / "flows" / "docs").exists(), "the docs and their pictures stay out"


def test_the_command_line_runs_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli.main", "config", "list"],
        env=os.environ | {"PYTHONPATH": str(wheel)},
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    assert str(wheel / "flows" / "recipes" / "demo.yaml") in done.stdout
