"""Fixtures that all tests share."""

import os
import re
import shlex
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.models.tiny import make_tiny_model
from tests.support.runs.forked import job_servers, start_server
from tests.support.runs.tiny_run import SERVER, Bench, start_prefect, tiny_recipe

# Set before any test imports the packages that read them.
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "600")
os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Workers of pytest-xdist share the cores out; threads that wait for each other cost more than they give.
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes minutes, so that no worker is left alone with it at the end."""
    longest = ("test_bad_inputs.py", "flows", "jobs", "cli")

    def urgency(item: pytest.Item) -> int:
        if "finished" in item.fixturenames:  # type: ignore[attr-defined]
            return 0
        return 1 if item.path.name in longest or item.path.parent.name in longest else 2

    for item in items:
        if item.path.parent.name == "security":
            item.add_marker(pytest.mark.security)
    items.sort(key=urgency)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """One worker of pytest-xdist runs a whole file, and one runs all files that read the shared runs."""
    from xdist.scheduler import LoadFileScheduling

    class ByFixture(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _group(config.rootpath / nodeid.partition("::")[0])

    return ByFixture(config, log)


@cache
def _group(file: Path) -> str:
    return "finished" if re.search(r"\b(finished|graph)[,:)]", file.read_text()) else str(file)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Workers of pytest-xdist share one Prefect server, which their controller starts."""
    node.workerinput[SERVER] = start_prefect()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config: pytest.Config, specs: list[Any]) -> None:
    """Workers of pytest-xdist are forked from one process, so that the libraries are loaded once."""
    os.environ["OMP_NUM_THREADS"] = (
        "1"  # they share the cores out; threads that wait for each other cost more
    )
    worker, address = Path(__file__).parent / "support" / "runs" / "worker.py", start_server()
    start_prefect()  # while the libraries are loaded
    for spec in specs:
        spec.python = shlex.join([sys.executable, str(worker), address])


def pytest_configure(config: pytest.Config) -> None:
    if address := getattr(config, "workerinput", {}).get(SERVER):
        os.environ[SERVER] = address


@pytest.fixture(scope="session", autouse=True)
def warm_job_servers() -> Iterator[None]:
    """Runs in the tests' own process have job servers that need not load the libraries."""
    with job_servers():
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data sets and small models that is not part of the repository."""
    folder = Path(os.environ.get("DPO_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"the shared data sets are not at {folder}; set DPO_SHARED to their folder")
    return folder


@pytest.fixture
def real_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 also on a processor that has to compute it in loops: fast enough for a tiny model."""
    monkeypatch.setattr("dpo_core.scoring.autocast._processor_has_bf16", lambda: True)


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """An empty workspace with the tiny recipe, in a folder with packages of the names of this project's."""
    folder = tmp_path_factory.mktemp("flows") / "base"
    folder.mkdir()
    for name in ("flows", "tasks", "deploy", "expectations", "dpo_core"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("raise ImportError('a package of the user')\n")
    model = make_tiny_model(folder.parent / "model", taught=True)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tiny_recipe(model, folder / "runs")))
    return Bench(folder)


@pytest.fixture(scope="session")
def finished(bench: Bench) -> tuple[Bench, dict]:
    """The workspace after one whole run, and its report."""
    return bench, bench.run()
