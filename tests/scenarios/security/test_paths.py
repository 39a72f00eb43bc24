"""Names and paths of strangers lead nowhere else: runs, events, data sets, pages."""

import gzip
import json
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import csv, feather, parquet

from dpo_core.data.files.read import check_source, read_rows
from dpo_core.errors import DataError, RecipeError
from flows.commands.worker_run import data_overrides
from tasks.reports.run_report import RunReport
from tasks.runs.record import RunRecord, list_runs
from tasks.store.files import plain_name, run_folder
from tests.scenarios.bad_inputs import dpo
from tests.support.reports.rendered import page
from tests.support.reports.run_reports import example

OUTSIDE = ("../../x", "..", ".", "", "a/b", "/etc", "a\\b/..", "x\n", "-rf", "~root")


@pytest.mark.parametrize("name", OUTSIDE)
def test_the_name_of_a_run_is_no_path(name: str, tmp_path: Path) -> None:
    workspace = tmp_path / "deep" / "runs"
    for ask in (lambda: plain_name(name), lambda: run_folder(workspace, name)):
        with pytest.raises(RecipeError, match="is not the name of a run"):
            ask()
    with pytest.raises(ValueError, match="run_id"):
        RunRecord(run_id=name, recipe="x", started_at=datetime.now(UTC))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [("show",), ("promote",)])
def test_no_command_reads_a_run_elsewhere(command: tuple[str, ...], tmp_path: Path) -> None:
    workspace, elsewhere = tmp_path / "ws", tmp_path / "elsewhere"
    for folder in (workspace / "runs", elsewhere):
        folder.mkdir(parents=True)
    (elsewhere / "report.json").write_text(example(steps=3).model_dump_json())
    done = dpo(*command, "../../elsewhere", "--workspace", str(workspace))
    assert done.code == 2
    assert "elsewhere" in done.err
    assert done.out == ""


def test_a_record_that_names_another_folder_is_no_run(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "good"
    folder.mkdir(parents=True)
    record = RunRecord(run_id="good", recipe="x", started_at=datetime.now(UTC))
    (folder / "run.json").write_text(record.model_dump_json())
    assert [run.run_id for run in list_runs(tmp_path)] == ["good"]
    facts = json.loads((folder / "run.json").read_text()) | {"run_id": "../../../home"}
    (folder / "run.json").write_text(json.dumps(facts))
    assert list_runs(tmp_path) == []


def test_an_event_names_no_file_outside_of_the_folder_of_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    inside, outside = data / "pairs.jsonl", tmp_path / "pairs.jsonl"
    for file in (inside, outside):
        file.write_text("{}")
    (data / "link.jsonl").symlink_to(outside)
    assert data_overrides(str(outside))[0] == f'data.path="{outside}"', "else any file may be named"
    monkeypatch.setenv("DPO_DATA", str(data))
    assert data_overrides(None) == []
    assert data_overrides(str(inside))[0] == f'data.path="{inside}"'
    for other in (outside, data / ".." / "pairs.jsonl", data / "link.jsonl", "somebody/set", f"{data}-2/x"):
        with pytest.raises(RecipeError, match="the only folder that this worker accepts"):
            data_overrides(str(other))


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "arrow", "csv", "json"])
def test_no_link_in_a_folder_that_an_event_named_leads_out_of_the_folder_of_data(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpo_core.data.files.confined._allowed", {})
    data, outside = tmp_path / "data", tmp_path / f"rows.{ending}"
    (data / "set").mkdir(parents=True)
    table = pa.table({"prompt": ["a", "b"], "chosen": ["x", "y"], "rejected": ["y", "x"]})
    written = {
        "csv": lambda: csv.write_csv(table, outside),
        "parquet": lambda: parquet.write_table(table, outside),
        "arrow": lambda: feather.write_feather(table, outside, compression="uncompressed"),
        "json": lambda: outside.write_text(json.dumps(table.to_pylist())),
    }
    text = "".join(json.dumps(row) + "\n" for row in table.to_pylist()).encode()
    kinds = {"gz": gzip.compress(text), "zst": pa.Codec("zstd").compress(text, asbytes=True)}
    written.get(ending, lambda: outside.write_bytes(kinds.get(ending[-3:].strip("."), text)))()
    link = data / "set" / outside.name
    link.symlink_to(outside)
    monkeypatch.setenv("DPO_DATA", str(data))
    data_overrides(str(data / "set"))
    for read in (read_rows, check_source):
        with pytest.raises(DataError, match="is a link to a place outside of"):
            list(read(str(data / "set")) or ())
    assert [rows for _, rows in read_rows(str(outside))] == [table.to_pylist()], "other data may lie anywhere"
    # A link to what lies inside leads nowhere else.
    link.unlink()
    outside.rename(data / outside.name)
    link.symlink_to(data / outside.name)
    assert [rows for _, rows in read_rows(str(data / "set"))] == [table.to_pylist()]


def test_a_data_set_names_no_other_file(tmp_path: Path) -> None:
    """Rows are values; a path in one is text. Nested folders are not walked, archives not unpacked."""
    (tmp_path / "secret.jsonl").write_text('{"prompt": "secret"}\n')
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "rows.jsonl").write_text('{"prompt": "../secret.jsonl"}\n')
    (folder / ".." / "set" / "inner").mkdir()
    (folder / "inner" / "rows.jsonl").symlink_to(tmp_path / "secret.jsonl")
    assert [row for _, rows in read_rows(str(folder)) for row in rows] == [{"prompt": "../secret.jsonl"}]
    for address in ("file:///etc/passwd", "https://example.org/x.jsonl", "zip://a::b", "a/../../b"):
        with pytest.raises(DataError, match="there is no file or folder"):
            list(read_rows(address))


def test_hostile_names_and_paths_are_text_on_the_page() -> None:
    hostile = "<script>alert(1)</script>|`\"'"
    report = example(steps=3)
    facts = json.loads(report.model_dump_json())
    assert facts["model"]
    facts["model"] |= {"name": hostile, "uri": f"file:///{hostile}"}
    facts["run"] |= {"recipe": hostile, "command": hostile, "tracking_uri": f"http://h/{hostile}"}
    for stage in facts["stages"]:
        stage["uri"] = f"file:///{hostile}"
    facts["notes"] = {"description": hostile, "Remote code": hostile}
    html = page(RunReport.model_validate(facts))
    assert "alert(1)" in html
    assert "<script" not in html
