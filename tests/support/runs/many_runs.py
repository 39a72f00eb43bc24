"""A workspace and its MLflow after a thousand runs, without a thousand runs' wait.

Rows and files of one real run are written again under other names, straight into the databases' own tables.
"""

import json
import shutil
import sqlite3
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from dpo_core.system import digest_json
from tasks.store.manifest import digest_folder
from tests.support.runs.tiny_run import Bench

OWN = ("train-dpo DPO", "evaluate")
"""Stages whose artifacts are each run's own; the others are shared."""
Row = dict[str, Any]


def multiply(bench: Bench, report: dict[str, Any], count: int) -> None:
    """Put so many runs beside the one that was made, each an hour older than the one before it."""
    parents = _in_mlflow(bench.workspace / "mlflow.db", report["run"]["mlflow_run_id"], count)
    for number, parent in enumerate(parents):
        _on_disk(bench.workspace, report, number, parent)


def _on_disk(workspace: Path, report: dict[str, Any], number: int, parent: str) -> None:
    name = f"tiny-past-{number:04d}"
    source, folder = workspace / "runs" / report["run"]["name"], workspace / "runs" / name
    folder.mkdir()
    shutil.copy(source / "page.html", folder)
    record = json.loads((source / "run.json").read_text())
    began = (datetime.fromisoformat(record["started_at"]) - timedelta(hours=number + 1)).isoformat()
    record |= {"run_id": name, "started_at": began, "mlflow_run_id": parent}
    (folder / "run.json").write_text(json.dumps(record))
    stages = [dict(stage) for stage in report["stages"]]
    lines = []
    for stage in stages:
        if stage["name"] in OWN:
            stage["sha256"], key = _artifact(workspace, stage, number)
            lines.append({"stage": stage["name"].partition(" ")[0], "key": key, "inputs": stage["parents"]})
    (folder / "stages.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    own = report | {"stages": stages, "run": report["run"] | {"name": name, "mlflow_run_id": parent}}
    (folder / "report.json").write_text(json.dumps(own))


def _artifact(workspace: Path, stage: dict[str, Any], number: int) -> tuple[str, str]:
    store = workspace / "store"
    index = next(
        path
        for path in (store / "index" / stage["name"].partition(" ")[0]).glob("*.json")
        if json.loads(path.read_text())["manifest"]["sha256"] == stage["sha256"]
    )
    facts = json.loads(index.read_text())["manifest"]
    made = store / "tmp" / "made"
    made.mkdir(parents=True)
    (made / "result.json").write_text(json.dumps({"number": number, "filling": "x" * 50_000}))
    sha256 = digest_folder(made)
    place = f"objects/{stage['kind']}/{sha256[:2]}/{sha256}"
    (store / place).parent.mkdir(parents=True, exist_ok=True)
    made.rename(store / place)
    facts |= {"sha256": sha256, "uri": place}
    key = digest_json([stage["name"], number])
    entry = {"sha256": digest_json(facts), "manifest": facts}
    index.with_name(f"{key}.json").write_text(json.dumps(entry))
    return sha256, key


def _in_mlflow(database: Path, parent: str, count: int) -> list[str]:
    """The run and its stages, again and again; the new parents."""
    with closing(sqlite3.connect(database)) as connection:
        family = [
            run
            for (run,) in connection.execute(
                "select run_uuid from tags where key = 'mlflow.parentRunId' and value = ?", [parent]
            )
        ] + [parent]
        mine: dict[str, Callable[[Row], bool]] = {
            name: lambda row: row["run_uuid"] in family
            for name in ("runs", "tags", "params", "metrics", "latest_metrics")
        }
        mine["inputs"] = lambda row: row["destination_id"] in family
        mine["model_versions"] = lambda row: row["run_id"] == parent
        versions = {row["version"] for row in _rows(connection, "model_versions", mine["model_versions"])}
        mine["model_version_tags"] = lambda row: row["version"] in versions
        last = connection.execute("select max(version) from model_versions").fetchone()[0]

        def number(row: Row, name: str, repeat: int) -> None:
            if name.startswith("model_version"):
                row["version"] = last + 1 + repeat

        named = _repeat(connection, mine, {*family}, count, number)
        return [names[parent] for names in named]


def _rows(connection: sqlite3.Connection, table: str, wanted: Callable[[Row], bool]) -> Iterator[Row]:
    found = connection.execute(f'select * from "{table}"')
    names = [column[0] for column in found.description]
    yield from (row for row in (dict(zip(names, values, strict=True)) for values in found) if wanted(row))


def _repeat(
    connection: sqlite3.Connection,
    tables: dict[str, Callable[[Row], bool]],
    known: set[str],
    count: int,
    change: Callable[[Row, str, int], None] = lambda row, name, repeat: None,
) -> list[dict[str, str]]:
    """Insert the rows again, so many times, with new names for what they name; those of each time."""
    templates = {name: list(_rows(connection, name, wanted)) for name, wanted in tables.items()}
    named = [{old: _like(old) for old in known} for _ in range(count)]
    connection.execute("pragma foreign_keys = off")
    for name, rows in templates.items():
        generated = [c[1] for c in connection.execute(f'pragma table_xinfo("{name}")') if c[6] in (2, 3)]
        columns = [column for column in (rows[0] if rows else {}) if column not in generated]
        listed = ", ".join(f'"{column}"' for column in columns)
        marks = ", ".join("?" for _ in columns)
        for repeat, names in enumerate(named):
            batch = []
            for row in rows:
                own = dict(row)
                if "input_uuid" in own:
                    own["input_uuid"] = uuid.uuid4().hex
                change(own, name, repeat)
                batch.append(
                    [names.get(own[c], own[c]) if isinstance(own[c], str) else own[c] for c in columns]
                )
            if batch:
                connection.executemany(f'insert into "{name}" ({listed}) values ({marks})', batch)
    connection.commit()
    return named


def _like(name: str) -> str:
    """A new name of the same form."""
    fresh = uuid.uuid4()
    if name.startswith("m-"):
        return f"m-{fresh.hex}"
    return str(fresh) if "-" in name else fresh.hex
