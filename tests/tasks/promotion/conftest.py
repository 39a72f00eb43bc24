"""Workspaces, each with its own MLflow database."""

from pathlib import Path

import pytest

from tests.support.runs.promotions import World


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database: making its tables costs more than the tests."""
    folder = tmp_path_factory.mktemp("empty")
    World(folder).tracker.ask("the tables", lambda client: client.search_registered_models())
    return folder / "mlflow.db"


@pytest.fixture
def world(database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return World.on(database, tmp_path / "runs")
