"""Whether a finished run is what it would have been without a fault: store, record, MLflow, processes."""

import contextlib
import json
import sqlite3
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
from mlflow import MlflowClient

from tasks.store.store import Store
from tests.flows.test_alignment import STAGES
from tests.support.runs.stored import assert_clean
from tests.support.runs.tiny_run import Bench

_CLOCKED = {"time", "seconds_per_step", "tokens_per_second"}
_EXPERIMENT, _MODEL = "dpo/tiny", "dpo-tiny"


def assert_store_clean(workspace: Path) -> None:
    """Every artifact whole and wanted by an index entry, nothing unfinished, no scratch of finished work."""
    store = Store(workspace)
    assert_clean(store)
    entries = list((store.root / "index").glob("*/*.json"))
    wanted = {json.loads(entry.read_text())["manifest"]["sha256"] for entry in entries}
    assert {folder.name for folder in (store.root / "objects").glob("*/*/*")} == wanted
    kept = {f"{entry.parent.name}/{entry.stem[:16]}" for entry in entries}
    scratch = {f"{f.parent.name}/{f.name}" for f in (workspace / "work").glob("*/*")}
    assert not scratch & kept, "the scratch folders of stages that are done"


def assert_record_whole(workspace: Path, runs: int = 1) -> list[dict[str, Any]]:
    """The records of finished runs, oldest first; each with its page, and nothing half-written beside."""
    folders = sorted((workspace / "runs").iterdir())
    records = [json.loads((folder / "run.json").read_text()) for folder in folders]
    assert len(records) == runs
    for folder, record in zip(folders, records, strict=True):
        assert record["status"] == "done"
        assert json.loads((folder / "report.json").read_text())["run"]["name"] == folder.name
        assert (folder / "page.html").read_text().rstrip().endswith("</html>")
        assert not list(folder.glob(".*"))
    return records


class Tracked:
    """What MLflow holds of a workspace."""

    def __init__(self, workspace: Path) -> None:
        self.path = workspace / "mlflow.db"
        self.client = MlflowClient(f"sqlite:///{self.path}")
        experiment = self.client.get_experiment_by_name(_EXPERIMENT).experiment_id
        runs = list(self.client.search_runs([experiment], max_results=1000))
        self.parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
        self.children = [run for run in runs if run not in self.parents]
        self.versions = list(self.client.search_model_versions(f"name = '{_MODEL}'"))

    def curves(self, run: Any) -> dict[str, list[tuple[int, float]]]:
        """Steps and values of every metric that does not depend on the clock."""
        names = {n for n in run.data.metrics if n not in _CLOCKED and not n.startswith("cost/")}
        found = {}
        for name in sorted(names):
            found[name] = sorted(
                (m.step, m.value) for m in self.client.get_metric_history(run.info.run_id, name)
            )
        return found

    def assert_sound(self) -> None:
        with contextlib.closing(sqlite3.connect(self.path)) as database:
            assert database.execute("pragma integrity_check").fetchall() == [("ok",)]
        for run in (*self.parents, *self.children):
            assert run.info.status == "FINISHED", run.info.run_name
            assert run.info.end_time >= run.info.start_time
            assert "dpo.error" not in run.data.tags
            for name, curve in self.curves(run).items():
                steps = Counter(step for step, _ in curve)
                assert max(steps.values()) == 1, f"{name} of {run.info.run_name}: {curve}"

    def assert_like(self, other: "Tracked") -> None:
        """One parent with the same children, numbers and inputs, and one registered version."""
        self.assert_sound()
        assert len(self.parents) == 1
        ours, theirs = (self._facts(tracked) for tracked in (self, other))
        assert ours.keys() == theirs.keys()
        for name in theirs:
            assert ours[name] == theirs[name], name
        assert [v.version for v in self.versions] == [1] or [v.version for v in self.versions] == ["1"]
        assert self.versions[0].run_id == self.parents[0].info.run_id
        assert self.versions[0].tags["dpo.weights_sha256"] == other.versions[0].tags["dpo.weights_sha256"]
        champion = self.client.get_model_version_by_alias(_MODEL, "challenger")
        assert champion.version == self.versions[0].version

    @staticmethod
    def _facts(tracked: "Tracked") -> dict[str, Any]:
        assert sorted(run.info.run_name for run in tracked.children) == sorted(STAGES)
        facts: dict[str, Any] = {}
        for run in (*tracked.parents, *tracked.children):
            name = run.data.tags.get("dpo.stage", "parent")
            inputs = sorted((i.dataset.name, i.dataset.digest) for i in run.inputs.dataset_inputs)
            facts[name] = {
                "metrics": tracked.curves(run),
                "costs": sorted(n for n in run.data.metrics if n.startswith("cost/")),
                "inputs": inputs,
                "artifact": run.data.tags.get("dpo.artifact_sha256"),
            }
        facts["parent"].pop("costs")  # what an earlier process computed costs the last one nothing
        return facts


def assert_as_undisturbed(bench: Bench, undisturbed: Bench) -> None:
    """Bit for bit the same artifacts, the same record and the same numbers."""
    assert bench.index() == undisturbed.index()
    assert_store_clean(bench.workspace)
    record = assert_record_whole(bench.workspace)[0]
    assert report_of(bench)["evaluation"] == report_of(undisturbed)["evaluation"]
    tracked = Tracked(bench.workspace)
    tracked.assert_like(Tracked(undisturbed.workspace))
    assert record["mlflow_run_id"] == tracked.parents[0].info.run_id


def report_of(bench: Bench) -> dict[str, Any]:
    """The report of the workspace's only run."""
    (path,) = (bench.workspace / "runs").glob("*/report.json")
    report: dict[str, Any] = json.loads(path.read_text())
    return report


def forget_from(bench: Bench, stage: str) -> None:
    """As if the run had come no further than just before this stage."""
    for later in STAGES[STAGES.index(stage) :]:
        for path in (bench.workspace / "store" / "index" / later.partition(" ")[0]).glob("*.json"):
            path.unlink()


def left_running(workspace: Path, seconds: float = 30) -> list[str]:
    """Command lines of what still runs in the workspace after so many seconds."""
    deadline = time.monotonic() + seconds
    while found := _running_in(workspace):
        if time.monotonic() > deadline:
            break
        time.sleep(0.2)
    return found


def _running_in(workspace: Path) -> list[str]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            line = " ".join(process.cmdline())
            # A job that was forked from a warm process has no path in its command line.
            if f"{workspace}/" in line or Path(process.cwd()) == workspace.parent:
                found.append(f"{process.pid} {line}")
    return found
