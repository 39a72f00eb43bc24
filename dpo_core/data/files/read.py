"""Reads rows from JSON lines, JSON, CSV, Parquet, Arrow and text files, plain or compressed, and hub sets.

Rows are streamed in chunks, so that a million rows are never in memory as Python objects.
"""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dpo_core.data.files.confined import open_file, open_plain, open_table
from dpo_core.data.files.json_window import JsonWindow
from dpo_core.data.files.splits import choose_split, files_of_split, split_of
from dpo_core.data.row import UNREADABLE, Row
from dpo_core.errors import DataError

CHUNK_ROWS = 50_000
CHUNK_BYTES = 64 * 2**20
BLOCK_CHARS = 4 * 2**20
# Files without rows that `datasets.save_to_disk` writes next to the data.
SIDE_FILES = {"dataset_info.json", "state.json", "dataset_dict.json", "dataset_infos.json"}


def read_rows(
    path: str, split: str | None = None, *, evaluation: bool = False, remarks: list[str] | None = None
) -> Iterator[tuple[int, list[Row]]]:
    """Yield chunks `(number of the first row, rows)`; rows count from 1, without headers and blank lines.

    The files of a folder are read in the order of their names, with continuous row numbers. Text is split at
    line feeds only: U+0085 and U+2028 are ordinary characters inside a line.

    Args:
        path: a local file or folder; any other name is loaded from the Hugging Face hub.
        split: the split of a hub data set, or of a folder whose files are named by splits (default: train).
        evaluation: whether the default is the held-out split.
        remarks: a list to which sentences about files of other splits are appended.

    Raises:
        DataError: the file does not exist, cannot be read or parsed, or has no rows.
    """
    first = 1
    for rows in _chunks(path, split, evaluation, [] if remarks is None else remarks):
        yield first, rows
        first += len(rows)


def check_source(path: str) -> None:
    """Check a source as `read_rows` does before its first row; the hub is not contacted.

    Raises:
        DataError: the path does not exist, is not readable, is empty, or has an unknown ending.
    """
    with _readable(path):
        files = _local_files(path)
        if files is None:
            _require_hub_name(path)
        for file in files or ():
            _check_file(file)


def names_splits(path: str) -> bool:
    """Whether the split of rows is given by file names or the hub; False for one file or other file names."""
    with _readable(path):
        files, folder = _local_files(path), Path(path).expanduser()
        return files is None or (folder.is_dir() and any(split_of(file, folder) for file in files))


def _chunks(path: str, split: str | None, evaluation: bool, remarks: list[str]) -> Iterator[list[Row]]:
    with _readable(path):
        files = _local_files(path)
        folder = Path(path).expanduser()
        if files and folder.is_dir():
            files, skipped = files_of_split(files, folder, split, evaluation=evaluation)
            remarks += [skipped] if skipped else []
        for file in files or ():
            yield from _file_chunks(file)
    if files is None:
        yield from _hub_chunks(path, split, remarks)


def _local_files(path: str) -> list[Path] | None:
    """The files of a local source; None if the path does not exist locally."""
    local = Path(path).expanduser()
    if local.is_dir():
        return _files_of(local)
    return [local] if local.exists() else None


@contextmanager
def _readable(path: str) -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        raise DataError(
            f"{error.filename or path} is not readable (permission denied)",
            "Give this user read access: chmod u+r for a file, u+rx for each folder above it",
        ) from error
    except (OSError, RuntimeError) as error:  # such as a name that is too long, or ~ of an unknown user
        raise DataError(f"{path[:200]} cannot be read ({error})"[:400], "Check the path") from error


def _files_of(folder: Path) -> list[Path]:
    """The data files directly in a folder, else in its folder `data`, else in folders named by splits."""
    below = [place for place in sorted(folder.iterdir()) if place.is_dir() and not place.name.startswith(".")]
    named = [place for place in below if split_of(place / "rows", folder)]
    for places in ([folder], [folder / "data"], named):
        files = [
            file
            for place in places
            if place.is_dir()
            for file in sorted(place.iterdir())
            if file.is_file()
            and file.name not in SIDE_FILES
            and not file.name.startswith(".")
            and _parser(file) not in (None, _lines)  # a text file beside data is a licence or a note
        ]
        if files:
            return files
    inside = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
    has = f"it holds {', '.join(inside[:8])}{' ...' if len(inside) > 8 else ''}" if inside else "it is empty"
    raise DataError(
        f"the folder {folder} has no data file directly in it; {has}",
        f"Point data.path at a file, or at a folder with files that end in {_ENDINGS}",
    )


_LFS = b"version https://git-lfs.github.com/spec/"


def _check_file(path: Path) -> Callable[[Path], "Parsed"]:
    """The parser of a file, which must be readable and not empty."""
    parse = _parser(path)
    if parse is None:
        raise DataError(
            f"{path} has an unknown ending",
            f"Convert or rename the file to one of {_ENDINGS}, each optionally with .gz or .zst",
        )
    if not path.is_file():
        raise DataError(f"{path} is neither a file nor a folder", "Set data.path to a regular file")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty (0 bytes)", "Check how it was written or copied")
    with open_file(path) as file:  # raises if it is not readable
        if file.read(len(_LFS)) == _LFS:
            raise DataError(
                f"{path} is a git-lfs pointer, not the data", "Fetch the data: git lfs pull, in its folder"
            )
    return parse


def _file_chunks(path: Path) -> Iterator[list[Row]]:
    parse = _check_file(path)
    rows: list[Row] = []
    done = size = 0
    try:
        for row, row_bytes in parse(path):
            rows.append(row)
            size += row_bytes
            if len(rows) >= CHUNK_ROWS or size >= CHUNK_BYTES:
                done += len(rows)
                yield rows
                rows, size = [], 0
    except PermissionError:
        raise
    except (EOFError, zlib.error, gzip.BadGzipFile, pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path} is cut off or damaged after row {done + len(rows)} ({error})",
            "Copy or download the file again",
        ) from error
    if rows:
        yield rows
    elif not done:
        raise DataError(f"{path} has no rows", "Check how it was written")


def _require_hub_name(name: str) -> None:
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith(".") or _parser(Path(name)):
        raise DataError(
            f"there is no file or folder {name}",
            "Check the path; a relative path starts in the folder in which dpo was called",
        )


def _hub_chunks(name: str, requested: str | None, remarks: list[str]) -> Iterator[list[Row]]:
    _require_hub_name(name)
    split = requested or "train"
    try:
        import datasets  # noqa: PLC0415 - takes seconds

        try:
            data = datasets.load_dataset(name, split=split)
        except ValueError as error:
            if requested or "split" not in str(error):
                raise
            splits = datasets.get_dataset_split_names(name)
            split = choose_split(splits, None)
            remarks.append(
                f"of the splits {', '.join(splits)}, {split} was read (set data.split to change it)"
            )
            data = datasets.load_dataset(name, split=split)
        data = data.with_format("arrow")
    except DataError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"{name} is not a local file or folder, and the hub data set {name} (split {split}) could not be "
            f"loaded: {type(error).__name__}: {reason}",
            "Check the name, data.split, the network and HF_HUB_OFFLINE, or give the path of a local copy",
        ) from error
    if not len(data):
        raise DataError(f"the hub data set {name} (split {split}) has no rows", "Choose another data.split")
    for table in data.iter(batch_size=CHUNK_ROWS):
        for part in _slices(table):
            yield _python_rows(part)


# --- one parser per file format: each yields (row, size in bytes) -----------------------------------------

Parsed = Iterator[tuple[Row, int]]


def _json_lines(path: Path) -> Parsed:
    with open_plain(path) as stream:
        for number, line in enumerate(stream, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if text.isspace() or not text:
                    continue
                row = json.loads(text)
            except UnicodeDecodeError as error:
                raise _not_utf8(path, f"line {number}", error) from error
            except json.JSONDecodeError as error:
                raise DataError(
                    f"line {number} of {path} is not valid JSON ({error})", "Correct or delete that line"
                ) from error
            except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of [
                row = {UNREADABLE: f"the row is JSON that cannot be read ({error})"}
            yield _checked(row, path, f"line {number}"), len(line)


def _lines(path: Path) -> Parsed:
    """The lines of a text file that are not blank, with the file's name."""
    with open_plain(path) as stream:
        for number, line in enumerate(stream, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                raise _not_utf8(path, f"line {number}", error) from error
            if text:
                yield {"line": text, "file": path.name}, len(line)


def _json(path: Path) -> Parsed:
    """Reads lists of rows, `{"data": [rows]}`, or single rows, streamed.

    Several lists in one file are read too, because files may have been concatenated.
    """
    number = 0
    with open_plain(path) as stream, io.TextIOWrapper(stream, "utf-8-sig", newline="") as text:
        try:
            source = JsonWindow(text, str(path), BLOCK_CHARS)
            while not source.at_end():
                opened = source.match(r'(?:\{\s*"data"\s*:\s*)?\[')
                if opened is None:
                    value, size = source.value(number)
                    wrapped = value.get("data") if isinstance(value, dict) else None
                    for row in wrapped if isinstance(wrapped, list) else [value]:
                        number += 1
                        yield _checked(row, path, f"row {number}"), size
                    continue
                while source.at_end() or source.match(r"\]") is None:
                    value, size = source.value(number)
                    number += 1
                    yield _checked(value, path, f"row {number}"), size
                if "{" in opened:  # {"data": [...], "version": 1}
                    source.rest_of_object(number)
        except UnicodeDecodeError as error:
            raise _not_utf8(path, f"a row after row {number}", error) from error


def _csv(path: Path) -> Parsed:
    csv.field_size_limit(2**31 - 1)  # an answer may be longer than the module's 128 KiB
    number = 0
    with open_plain(path) as stream, io.TextIOWrapper(stream, "utf-8-sig", newline="") as text:
        # strict: otherwise an unclosed quote would make the rest of the file one field.
        reader = csv.DictReader(text, strict=True)
        try:
            names = list(reader.fieldnames or [])
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise DataError(f"{path} has two columns named {twice[0]!r}", "Rename one of them")
            for number, row in enumerate(reader, 1):  # noqa: B007  (the error messages need it)
                yield row, sum(len(value) for value in row.values() if value)
        except csv.Error as error:
            raise DataError(
                f"row {number + 1} of {path} (before line {reader.line_num + 1}) is not valid CSV ({error})",
                "Put quotes around fields with commas, quotes or line breaks, and double the quotes inside",
            ) from error
        except UnicodeDecodeError as error:
            raise _not_utf8(path, f"a row after row {number}", error) from error


def _parquet(path: Path) -> Parsed:
    with pq.ParquetFile(open_table(path)) as file:
        for batch in file.iter_batches(batch_size=4096):
            yield from _table_rows(batch)


def _arrow(path: Path) -> Parsed:
    source = open_table(path)
    is_file = source.read(6) == b"ARROW1"  # else the stream form, which `datasets` writes
    source.seek(0)
    if is_file:
        reader = pa.ipc.open_file(source)
        for index in range(reader.num_record_batches):
            yield from _table_rows(reader.get_batch(index))
    else:
        for batch in pa.ipc.open_stream(source):
            yield from _table_rows(batch)


def _table_rows(table: Any) -> Parsed:
    for part in _slices(table):
        each = part.nbytes // max(part.num_rows, 1)
        for row in _python_rows(part):
            yield row, each


def _python_rows(table: Any) -> list[Row]:
    """The rows of a table, without the null fields that Arrow adds to the objects of a list."""
    nested = [column.name for column in table.schema if _holds_objects(column.type)]
    rows: list[Row] = table.to_pylist()
    for row in rows if nested else ():
        for name in nested:
            row[name] = _without_nulls(row[name])
    return rows


def _holds_objects(kind: Any) -> bool:
    return any(pa.types.is_struct(kind.field(i).type) or _holds_objects(kind.field(i).type)
               for i in range(kind.num_fields))  # fmt: skip


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _slices(table: Any) -> Iterator[Any]:
    """Cut a batch into slices of limited size as Python objects (wide columns, embeddings)."""
    step = max(1, min(CHUNK_ROWS, CHUNK_BYTES * max(table.num_rows, 1) // max(table.nbytes, 1)))
    for start in range(0, table.num_rows, step):
        yield table.slice(start, step)


# --- helpers ----------------------------------------------------------------------------------------------

PARSERS: dict[str, Callable[[Path], Parsed]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".txt": _lines,
}
_ENDINGS = ", ".join(PARSERS)


def _parser(path: Path) -> Callable[[Path], Parsed] | None:
    name = path.name.lower().removesuffix(".gz").removesuffix(".zst")
    return PARSERS.get(Path(name).suffix)


def _checked(row: object, path: Path, where: str) -> Row:
    if not isinstance(row, dict):
        raise DataError(
            f"{where} of {path} is a JSON {type(row).__name__}, not an object with named fields",
            'Write every row as {"field": value, ...}',
        )
    return row


def _not_utf8(path: Path, where: str, error: UnicodeDecodeError) -> DataError:
    return DataError(
        f"{where} of {path} is not UTF-8 text (byte 0x{error.object[error.start]:02x}: {error.reason})",
        "Save the file as UTF-8, for example with: iconv -f UTF-16 -t UTF-8 (with its real encoding)",
    )
