"""A tiny real run: a two-layer model, the self-made openings, every stage, the real command line."""

import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import httpx
import yaml

from tests.support.runs import forked

SERVER = "DPO_TEST_PREFECT"
"""Variable with the address of the Prefect server that the workers of a test run share."""
ENGINE = {"precision": "fp32", "threads": 1, "save_every": 1}
SIZES = {"epochs": 50, "max_steps": 2, "batch_size": 8, "micro_batch_size": 8, "engine": ENGINE}


def tiny_recipe(model: Path, workspace: Path) -> dict:
    """All stages in their smallest real form; the reward is one that a random model can move."""
    reward = Path(__file__).with_name("vowels.py")
    return {
        "name": "tiny",
        "workspace": str(workspace),
        "model": {"name": str(model)},
        "data": {"openings": 24, "eval_fraction": 0.3},
        "tokens": {"max_length": 96, "max_prompt_length": 64},
        "sft": {
            "made_demonstrations": 16,
            "batch_size": 8,
            "micro_batch_size": 8,
            "engine": ENGINE,
        },
        "pairs": {"samples_per_prompt": 4, "sampling": {"max_new_tokens": 12, "precision": "fp32"}},
        "reward": {"source": f"{reward}:vowels"},
        "policies": {
            "DPO": {
                "method": "dpo",
                "epochs": 50,
                "max_steps": 3,
                "batch_size": 8,
                "micro_batch_size": 8,
                "engine": ENGINE,
            },
            "PPO": {
                "method": "ppo",
                "iterations": 2,
                "episodes": 8,
                "micro_batch_size": 8,
                "epochs": 1,
                "engine": ENGINE,
            },
        },
        "evaluate": {
            "prompts": 6,
            "samples_per_prompt": 2,
            "sampling": {"max_new_tokens": 12, "precision": "fp32"},
            "precision": "fp32",
        },
    }


@functools.cache
def start_prefect() -> str:
    """Start the Prefect server that all runs share; its address, whose requests wait until it is up."""
    from flows.process.temporary_server import TemporaryServer

    with patch.dict(os.environ, PREFECT_HOME=tempfile.mkdtemp(prefix="prefect-")):
        return TemporaryServer().address


@functools.cache
def prefect_address() -> str:
    """The Prefect server that all runs share, up: starting one takes longer than a tiny stage."""
    address = os.environ.get(SERVER) or start_prefect()
    httpx.get(f"{address}/health", timeout=600).raise_for_status()
    return address


@dataclass
class Bench:
    """A workspace with a recipe, and the command line on it."""

    folder: Path

    @property
    def recipe(self) -> Path:
        return self.folder / "tiny.yaml"

    @property
    def workspace(self) -> Path:
        return self.folder / "runs"

    def environment(self) -> dict[str, str]:
        # One Prefect home for all runs of the session: its database is made once.
        home = self.folder.parent / "prefect"
        return os.environ | {
            "PREFECT_HOME": str(home),
            "CUDA_VISIBLE_DEVICES": "",
            "MLFLOW_TRACKING_URI": "",
            # Tests run side by side; threads that wait for each other on busy cores spin.
            "OMP_NUM_THREADS": "1",
        }

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-P", "-m", "flows.cli.main", *arguments]

    def dpo(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        env = self.environment() | {"PREFECT_API_URL": prefect_address()}
        return forked.dpo(arguments, env=env, cwd=self.folder)

    def run(self, *arguments: str) -> dict:
        """`dpo run` on the recipe; its report."""
        done = self.dpo("run", str(self.recipe), "--json", *arguments)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def copy(self, name: str) -> "Bench":
        """The same state in another folder: a store may be moved."""
        target = self.folder.parent / name  # or elsewhere, by a whole path
        shutil.copytree(self.folder, target)
        recipe = yaml.safe_load(self.recipe.read_text())
        recipe["workspace"] = str(target / "runs")
        (target / "tiny.yaml").write_text(yaml.safe_dump(recipe))
        return Bench(target)

    def states(self, report: dict) -> dict[str, str]:
        return {stage["name"]: stage["state"] for stage in report["stages"]}

    def index(self) -> dict[str, str]:
        """Stage and key of everything in the store, with the artifact's digest."""
        root = self.workspace / "store" / "index"
        return {
            f"{path.parent.name}/{path.stem}": json.loads(path.read_text())["manifest"]["sha256"]
            for path in sorted(root.glob("*/*.json"))
        }
