"""What the tests of tracking share: a recipe, a trainer's lines, and questions to MLflow."""

import json
import socket
from typing import Any

from tasks.tracking.mlflow_run import StageRun
from tasks.tracking.tracker import Tracker

RECIPE = {"name": "tiny", "train": {"beta": 0.1, "lr": 1e-6, "optimizer": {"eps": 1e-8}}, "seed": 1}


def client(tracker: Tracker) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracker.uri, tracker.uri)


def children(tracker: Tracker) -> list[Any]:
    query = f"tags.`mlflow.parentRunId` = '{tracker.run_id}'"
    return list(client(tracker).search_runs([tracker.experiment_id], query))


def points(tracker: Tracker, run: StageRun, key: str) -> list[tuple[int, float]]:
    return sorted((m.step, m.value) for m in client(tracker).get_metric_history(run.run_id, key))


def lines(steps: range, **more: float) -> str:
    rows = ({"step": s, "time": 1.7e9 + s, "loss": s / 8, "rewards/chosen": -s, **more} for s in steps)
    return "".join(json.dumps(row) + "\n" for row in rows)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
