"""The stages and artifacts that each run references, so that garbage collection keeps them.

A run appends a line per stage to its `stages.jsonl` before it looks the stage up, under the store's guard.
`dpo gc` holds the guard while it selects and hides artifacts. So a stage was either recorded before that and
is kept, or it is looked up afterwards and runs again.
"""

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from tasks.runs.record import RunRecord
from tasks.store.files import disk_errors, run_folder
from tasks.store.store import Store

LIST = "stages.jsonl"


class UsedArtifacts(NamedTuple):
    """The references of one run."""

    run_id: str
    record: RunRecord | None
    """None if it is not readable."""
    keys: frozenset[tuple[str, str]]
    """Stages and keys that the run looked up."""
    digests: frozenset[str]
    """Artifacts that the run read or made."""
    is_study: bool
    """Whether it is a finished study."""
    tracking_uri: str | None
    """The MLflow in which its model was registered."""

    @property
    def finished(self) -> bool:
        """Whether the run ended successfully."""
        return self.record is not None and self.record.status == "done"


def record_lookup(store: Store, run_id: str, stage: str, key: str, inputs: Iterable[str]) -> None:
    """Record that a run is about to look up a stage, and which artifacts that stage reads."""
    line = json.dumps({"stage": stage, "key": key, "inputs": list(inputs)}) + "\n"
    with disk_errors(store.workspace, "recording the run's references"), store.guard():
        path = run_folder(store.workspace, run_id) / LIST
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(handle, line.encode())
        finally:
            os.close(handle)


def read_references(workspace: Path) -> list[UsedArtifacts]:
    """The references of every run of the workspace. A folder without a record and a list is not a run."""
    folders = [folder for folder in (workspace / "runs").glob("*") if folder.is_dir()]
    return [run for folder in sorted(folders) if (run := _references(folder)) is not None]


def _references(folder: Path) -> UsedArtifacts | None:
    record = None
    with suppress(OSError, ValueError):
        record = RunRecord.model_validate_json((folder / "run.json").read_bytes())
    keys, digests = set(), set()
    lines = _lines(folder / LIST)
    for line in lines:
        keys.add((line["stage"], line["key"]))
        digests.update(line["inputs"])
    report = _report(folder / "report.json")
    for stage in report.get("stages", ()):
        digests.update([stage["sha256"], *stage["parents"]])
    if record is None and not (folder / "run.json").exists() and not lines:
        return None
    return UsedArtifacts(
        folder.name,
        record,
        frozenset(keys),
        frozenset(digests - {None}),
        "study" in report,
        report.get("run", {}).get("tracking_uri"),
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of the list. A kill or a full disk may have cut the last one."""
    lines = []
    with suppress(OSError):
        for text in path.read_text().splitlines():
            with suppress(ValueError, KeyError, TypeError):
                line = json.loads(text)
                lines.append({"stage": line["stage"], "key": line["key"], "inputs": list(line["inputs"])})
    return lines


def _report(path: Path) -> dict[str, Any]:
    try:
        report = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return report if isinstance(report, dict) else {}
