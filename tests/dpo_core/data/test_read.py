"""Every file format and compression round-trips, and every damaged file gives an actionable error."""

import gzip
import json
import os
import shutil
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from dpo_core.data.files import read
from dpo_core.data.files.read import read_rows
from dpo_core.errors import DataError

# U+0085 and U+2028 end a line for str.splitlines(), but not in a data file.
ROWS = [
    {"prompt": "one\u0085still one", "chosen": 'a "quoted", text', "rejected": "two\nlines"},
    {"prompt": "zwei\u2028Wörter 日本", "chosen": "", "rejected": "r\r\nr"},
]


def _csv(rows: list[dict]) -> bytes:
    quoted = [['"' + str(value).replace('"', '""') + '"' for value in row.values()] for row in rows]
    return "\n".join([",".join(rows[0]), *(",".join(row) for row in quoted), ""]).encode()


def _ipc(rows: list[dict], new: object) -> bytes:
    table, sink = pa.Table.from_pylist(rows), pa.BufferOutputStream()
    with new(sink, table.schema) as writer:  # type: ignore[operator]
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def _parquet(rows: list[dict]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def _lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


WRITERS = {
    "jsonl": (".jsonl", _lines),
    "ndjson": (".ndjson", _lines),
    "json list": (".json", lambda rows: json.dumps(rows, indent=1).encode()),
    "json data": (".json", lambda rows: json.dumps({"data": rows}).encode()),
    "json data last": (".json", lambda rows: json.dumps({"version": 1, "data": rows}).encode()),
    "json lines": (".json", _lines),
    "csv": (".csv", _csv),
    "parquet": (".parquet", _parquet),
    "arrow file": (".arrow", lambda rows: _ipc(rows, pa.ipc.new_file)),
    "arrow stream": (".arrow", lambda rows: _ipc(rows, pa.ipc.new_stream)),
}
PACKERS = {"": lambda data: data, ".gz": gzip.compress, ".zst": zstandard.compress}


def rows_of(path: Path | str) -> list[dict]:
    return [row for _, rows in read_rows(str(path)) for row in rows]


@pytest.mark.parametrize("packed", PACKERS, ids=lambda suffix: suffix or "plain")
@pytest.mark.parametrize("container", WRITERS)
def test_round_trip(tmp_path: Path, container: str, packed: str) -> None:
    suffix, write = WRITERS[container]
    path = tmp_path / f"rows{suffix}{packed}"
    path.write_bytes(PACKERS[packed](write(ROWS)))
    assert rows_of(path) == ROWS


def test_chunks_carry_the_number_of_their_first_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "CHUNK_ROWS", 3)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"text": "{n}"}}\n' for n in range(1, 9)))
    chunks = list(read_rows(str(path)))
    assert [(first, len(rows)) for first, rows in chunks] == [(1, 3), (4, 3), (7, 2)]
    assert all(rows[0] == {"text": str(first)} for first, rows in chunks)


def test_chunks_are_small_in_bytes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "CHUNK_BYTES", 10_000)
    for suffix, write in (WRITERS["jsonl"], WRITERS["parquet"]):
        path = tmp_path / f"rows{suffix}"
        path.write_bytes(write([{"text": "x" * 4000}] * 10))
        sizes = [len(rows) for _, rows in read_rows(str(path))]
        assert sum(sizes) == 10
        assert max(sizes) <= 3


@pytest.mark.parametrize("block", [7, 64])
def test_json_list_is_read_piece_by_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(read, "BLOCK_CHARS", block)
    rows = [{"text": "long " * n, "n": n, "nested": [{"a": ["]", "}"]}]} for n in range(60)]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows, indent=2))
    assert rows_of(path) == rows


def test_folder_is_read_in_name_order_and_numbered_through(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text('{"text": "three"}\n')
    (tmp_path / "a.csv").write_text("text\none\ntwo\n")
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / "state.json").write_text('{"_fingerprint": "x"}')  # what datasets.save_to_disk adds
    assert [(first, [row["text"] for row in rows]) for first, rows in read_rows(str(tmp_path))] == [
        (1, ["one", "two"]),
        (3, ["three"]),
    ]


def test_folder_of_save_to_disk(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    assert rows_of(tmp_path / "saved") == ROWS


def test_blank_lines_and_byte_order_mark_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n{"text": "b"}')
    assert rows_of(path) == [{"text": "a"}, {"text": "b"}]
    path = tmp_path / "rows.csv"
    path.write_bytes(b"\xef\xbb\xbftext\na\n")
    assert rows_of(path) == [{"text": "a"}]


def test_compression_is_seen_from_the_content(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(gzip.compress(_lines(ROWS)))
    assert rows_of(path) == ROWS


GOOD = b'{"text": "a"}\n'
BAD_FILES = {
    "broken line": ("x.jsonl", GOOD + b'{"text": "b"\n' + GOOD, ["line 2", "not valid JSON", "delete"]),
    "line is no object": ("x.jsonl", GOOD + b"[1]\n", ["line 2", "JSON list"]),
    "broken json": ("x.json", b'[{"a": 1}, {"a": oops}]', ["row 2", "not valid JSON"]),
    "cut off json": ("x.json", b'[{"a": 1}, {"a": "x', ["row 2", "cut off"]),
    "json without its end": ("x.json", b'[{"a": 1}, {"a": 2}', ["row 3", "cut off"]),
    "json of no objects": ("x.json", b'["a", "b"]', ["row 1", "JSON str"]),
    "not utf-8": ("x.jsonl", GOOD + '{"text": "é"}\n'.encode("latin-1"), ["line 2", "not UTF-8", "0xe9"]),
    "json not utf-8": ("x.json", b'\x80[{"a": 1}]', ["not UTF-8", "0x80"]),
    "utf-16 csv": ("x.csv", "text\nabc\n".encode("utf-16"), ["not UTF-8", "iconv"]),
    "empty": ("x.jsonl", b"", ["empty (0 bytes)"]),
    "only white space": ("x.jsonl", b"\n \n", ["has no rows"]),
    "empty list": ("x.json", b"[]", ["has no rows"]),
    "empty data": ("x.json", b'{"data": []}', ["has no rows"]),
    "header only": ("x.csv", b"prompt,chosen\n", ["has no rows"]),
    "column twice": ("x.csv", b"a,b,a\n1,2,3\n", ["two columns named 'a'"]),
    "open quote": ("x.csv", b'a,b\n1,2\n3,"4\n', ["row 2", "not valid CSV"]),
    "unknown ending": ("x.docx", b"PK", [".docx", ".jsonl", "Convert"]),
    "no parquet": ("x.parquet", b"PAR0 nothing of the kind", ["damaged"]),
    "no arrow": ("x.arrow", b"nothing of the kind", ["damaged"]),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file_is_named_with_place_and_remedy(tmp_path: Path, case: str) -> None:
    name, content, words = BAD_FILES[case]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        rows_of(path)
    assert str(path) in caught.value.problem
    assert caught.value.remedy
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize("packed", [".gz", ".zst"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_cut_off_compressed_file(tmp_path: Path, suffix: str, packed: str) -> None:
    rows = [{"text": f"{n} {os.urandom(20).hex()}"} for n in range(2000)]
    whole = PACKERS[packed](next(write for end, write in WRITERS.values() if end == suffix)(rows))
    path = tmp_path / f"x{suffix}{packed}"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cut off or damaged after row \d+") as caught:
        rows_of(path)
    assert str(path) in str(caught.value)


def test_folders_without_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="it is empty"):
        rows_of(tmp_path)
    (tmp_path / "train").mkdir()
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(DataError, match=r"it holds notes\.md, train/"):
        rows_of(tmp_path)


@pytest.mark.parametrize(
    "name", ["missing.jsonl", "./missing", "/no/such/place", "~/no such", "a/b/c.parquet"]
)
def test_missing_file_does_not_ask_the_hub(name: str) -> None:
    with pytest.raises(DataError, match="there is no file or folder") as caught:
        rows_of(name)
    assert name in str(caught.value)


def test_hub_name_offline_says_what_was_tried() -> None:
    with pytest.raises(DataError) as caught:
        rows_of("nobody-here/no-such-data")
    message = str(caught.value)
    assert "not a local file or folder" in message
    assert "hub data set nobody-here/no-such-data (split train)" in message
    assert "HF_HUB_OFFLINE" in message


@pytest.mark.parametrize("closed", ["file", "folder"])
def test_without_permission(tmp_path: Path, closed: str) -> None:
    folder = Path(tempfile.mkdtemp())  # not tmp_path: its own parents are closed to other users
    path = folder / "x.jsonl"
    path.write_bytes(GOOD)
    folder.chmod(0o755)
    (path if closed == "file" else folder).chmod(0o000)
    try:
        message = _message_as_ordinary_user(path)
    finally:
        folder.chmod(0o700)
        shutil.rmtree(folder)
    assert f"{path} is not readable (permission denied)" in message
    assert "chmod" in message


def _message_as_ordinary_user(path: Path) -> str:
    """What reading says; in a forked child that gives up its rights where the tests run as root."""
    here, there = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            outcome = f"read {rows_of(path)}"
        except BaseException as error:
            outcome = f"{type(error).__name__}: {error}"
        os.write(there, outcome.encode())
        os._exit(0)
    os.close(there)
    os.waitpid(child, 0)
    with os.fdopen(here) as pipe:
        return pipe.read()
