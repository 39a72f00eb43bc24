"""What a run needs of the store: the stages that it asked for, written down before it looks for them.

A run's `stages.jsonl` holds one line a stage, appended under the store's guard. `dpo gc` holds the guard
while it looks and takes things out of sight: a stage is either written down before that, and stays, or it
looks afterwards, and finds that it has to run.
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


class Needs(NamedTuple):
    """What one run holds on to."""

    run_id: str
    record: RunRecord | None
    """None where it is not readable."""
    keys: frozenset[tuple[str, str]]
    """Stages and keys that it asked for."""
    digests: frozenset[str]
    """Artifacts that it read or made."""
    is_study: bool
    """Whether it is a finished frontier."""
    tracking_uri: str | None
    """The MLflow that its model was registered in."""

    @property
    def finished(self) -> bool:
        """Whether it ended well."""
        return self.record is not None and self.record.status == "done"

    @property
    def told(self) -> bool:
        """Whether all that the run needs is known. Older versions wrote it down at the end only."""
        if self.record is None:
            return bool(self.keys)
        return self.record.lists_stages or (self.finished and bool(self.digests))


def note_need(store: Store, run_id: str, stage: str, key: str, inputs: Iterable[str]) -> None:
    """Write down that a run is about to look for a stage, and what that stage reads."""
    line = json.dumps({"stage": stage, "key": key, "inputs": list(inputs)}) + "\n"
    with disk_errors(store.workspace, "writing down what the run needs"), store.guard():
        path = run_folder(store.workspace, run_id) / LIST
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(handle, line.encode())
        finally:
            os.close(handle)


def read_needs(workspace: Path) -> list[Needs]:
    """What every run of the workspace needs; a folder without a record and a list is no run."""
    folders = [folder for folder in (workspace / "runs").glob("*") if folder.is_dir()]
    found = [_needs(folder) for folder in sorted(folders)]
    return [needs for needs in found if needs is not None]


def _needs(folder: Path) -> Needs | None:
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
    return Needs(
        folder.name,
        record,
        frozenset(keys),
        frozenset(digests - {None}),
        "study" in report,
        report.get("run", {}).get("tracking_uri"),
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines; a kill, or a full disk, may have cut one."""
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
