"""Runs of one recipe in one process, each met by a fault of the disk at another moment: the driver of
`test_disk`. The flow is real, and so are Prefect's server, MLflow, the trainers and the disk.

    python -m tests.scenarios.faults.disk_runs RECIPE FAULT IMAGE PLACE

Prints what happened as JSON, one line a moment.
"""

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flows.process.environment import keep_quiet

ENDED = "evaluate: "
MOMENTS = [
    "load-data: running",
    "import-model: running",
    "validate-prompts: running",
    "prepare-sft: running",
    "work/prepare-sft/*/checkpoints/tmp-*",
    "store/tmp/*",
    "sample-pairs: running",
    "validate-pairs: running",
    "cache-reference: running",
    "train-dpo DPO: running",
    "work/train-dpo/*/checkpoints/step-00000002",
    "train-ppo PPO: running",
    "evaluate: running",
    ENDED,
]
"""When the disk fails: at a line that the run says, or as soon as a file is there. The last one is the time
of the registration and of the run page."""


class Moment(logging.Handler):
    """Does something once, at a moment."""

    def __init__(self, what: str, workspace: Path, act: Callable[[], None]) -> None:
        super().__init__()
        self.what, self.workspace, self.act = what, workspace, act
        self.met = False
        if "*" in what:
            threading.Thread(target=self._watch, daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        said = record.getMessage()
        # "evaluate: " is what the stage says when it has ended.
        if said == self.what or (self.what == ENDED and said.startswith(ENDED) and "running" not in said):
            self.meet()

    def _watch(self) -> None:
        # What lay there before is not what is waited for.
        before = set(self.workspace.glob(self.what))
        while not self.met:
            if set(self.workspace.glob(self.what)) - before:
                self.meet()
            time.sleep(0.002)

    def meet(self) -> None:
        if not self.met:
            self.met = True
            self.act()


def main(recipe_path: str, fault: str, image: str, place: str) -> None:
    keep_quiet()
    # A pool would keep the database of the disk open that was mended since.
    os.environ["MLFLOW_SQLALCHEMYSTORE_POOLCLASS"] = "NullPool"
    from dpo_core.errors import DpoError
    from flows.alignment import alignment
    from tasks.recipe.read import load_recipe
    from tasks.store.store import Store
    from tests.scenarios.faults.disks import SmallDisk
    from tests.support.runs.stored import assert_clean

    recipe = load_recipe(recipe_path, [])
    log = logging.getLogger("dpo")
    log.setLevel(logging.INFO)
    log.propagate = False
    with SmallDisk(Path(image), Path(place)) as disk:
        for number, what in enumerate(MOMENTS):
            moment = Moment(what, Path(place), disk.fill if fault == "full" else disk.fail)
            log.handlers = [moment]
            start = time.monotonic()
            facts = {"moment": what, "error": None}
            try:
                alignment(recipe, "latest" if number else None)
            except DpoError as error:
                facts = {"moment": what, "error": type(error).__name__, "code": error.exit_code}
                facts |= {"said": str(error)}
            except Exception as error:
                facts = {"moment": what, "error": type(error).__name__, "said": str(error)}
            facts |= {"met": moment.met, "seconds": round(time.monotonic() - start, 1)}
            moment.met = True
            (disk.free if fault == "full" else disk.mend)()
            Store(place).sweep()  # as the next run does; a disk that could only be read kept what was to go
            assert_clean(Store(place))
            records = [json.loads(path.read_text()) for path in sorted(Path(place).glob("runs/*/*.json"))]
            statuses = [r.get("status") for r in reversed(records)]  # run.json first
            print(json.dumps(facts | {"records": statuses}), flush=True)
        log.handlers = []
        report = alignment(recipe, "latest")
        print(json.dumps(_left(Path(place)) | {"report": report.model_dump(mode="json")}), flush=True)


def _left(workspace: Path) -> dict[str, Any]:
    """What the whole run left behind."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{workspace}/mlflow.db")
    (path,) = workspace.glob("runs/*/run.json")
    record = json.loads(path.read_text())
    parent = client.get_run(record["mlflow_run_id"])
    query = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    children: dict[str, list[str]] = {}
    for child in client.search_runs([parent.info.experiment_id], query):
        children.setdefault(child.info.run_name, []).append(child.info.status)
        if child.info.run_name == "train-dpo DPO":
            steps = sorted(m.step for m in client.get_metric_history(child.info.run_id, "loss"))
    return {
        "index": {
            f"{entry.parent.name}/{entry.stem}": json.loads(entry.read_text())["manifest"]["sha256"]
            for entry in sorted(workspace.glob("store/index/*/*.json"))
        },
        "children": dict(sorted(children.items())),
        "parent": parent.info.status,
        "steps": steps,
        "record": record["status"],
        "left": [
            str(path)
            for pattern in ("store/tmp/*", "work/*/*", "tracking_outbox/*", "runs/*/.*")
            for path in workspace.glob(pattern)
        ],
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
