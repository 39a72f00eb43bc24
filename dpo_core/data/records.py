"""The canonical tables that every later stage reads, and `load`, which makes them from any source.

Bad rows are kept with a reason in `fault` and empty texts: the data gate counts them and decides.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from dpo_core.data.config import DataConfig, Format
from dpo_core.data.formats import ADAPTERS, Fault, Kind, Pair, Prompt, Record, Row, Unpaired, recognise
from dpo_core.data.openings import review_openings
from dpo_core.data.read import read_rows
from dpo_core.errors import DataError

_TEXT, _FLAG = pa.large_string(), pa.bool_()
_SCHEMAS: dict[Kind, Any] = {
    "pairs": pa.schema(
        {
            "id": _TEXT,
            "row": pa.int64(),
            "prompt": _TEXT,
            "chat": _FLAG,
            "chosen": _TEXT,
            "rejected": _TEXT,
            "chosen_ended": _FLAG,
            "rejected_ended": _FLAG,
            "agreement": pa.float64(),
            "fault": _TEXT,
        }
    ),
    "unpaired": pa.schema(
        {
            "id": _TEXT,
            "row": pa.int64(),
            "prompt": _TEXT,
            "chat": _FLAG,
            "completion": _TEXT,
            "label": _FLAG,
            "ended": _FLAG,
            "fault": _TEXT,
        }
    ),
    "prompts": pa.schema({"id": _TEXT, "row": pa.int64(), "prompt": _TEXT, "chat": _FLAG, "fault": _TEXT}),
}
PAIR_COLUMNS: list[str] = _SCHEMAS["pairs"].names
"""id (sha256 of the content), row (source row, from 1), prompt (text, or compact JSON messages if chat),
chat, chosen, rejected, *_ended (the answer is complete, so EOS follows it), agreement (share of votes for
the chosen answer, empty where nobody counted), fault ("" = none)."""
UNPAIRED_COLUMNS: list[str] = _SCHEMAS["unpaired"].names
PROMPT_COLUMNS: list[str] = _SCHEMAS["prompts"].names
_EMPTY: dict[Kind, Record] = {
    "pairs": Pair("", False, "", ""),
    "unpaired": Unpaired("", False, "", False),
    "prompts": Prompt("", False),
}


@dataclass(frozen=True)
class Loaded:
    """A canonical table and where it came from."""

    frame: pd.DataFrame
    kind: Kind
    format: Format
    recognised_by: str
    """A sentence: how the format was recognised, or that the recipe set it."""
    notes: dict[str, int] = field(default_factory=dict)
    """Counts: rows_read, ties_dropped, faults, and left_by_limit where a limit applied."""


def record_id(record: Record) -> str:
    """sha256 (hex) of what a model would learn from: texts, chat and the ended flags, not votes or row.

    Raises:
        UnicodeEncodeError: a text holds half of a surrogate pair, which no file can store.
    """
    # The lengths in front keep ("ab", "c") and ("a", "bc") apart.
    match record:
        case Pair():
            lengths = f"{len(record.prompt)},{len(record.chosen)}"
            flags = f"{record.chat:d}{record.chosen_ended:d}{record.rejected_ended:d}"
            content = f"pair {lengths},{flags}\n{record.prompt}{record.chosen}{record.rejected}"
        case Unpaired():
            flags = f"{record.chat:d}{record.ended:d}{record.label:d}"
            content = f"unpaired {len(record.prompt)},{flags}\n{record.prompt}{record.completion}"
        case Prompt():
            content = f"prompt {record.chat:d}\n{record.prompt}"
    return hashlib.sha256(content.encode()).hexdigest()


def to_frame(
    records: Iterable[Record], kind: Kind = "pairs", rows: Sequence[int] | None = None
) -> pd.DataFrame:
    """The canonical table of records, with ids and row numbers (1, 2, ... unless given)."""
    listed = list(records)
    return _frame([_table(listed, kind, range(1, len(listed) + 1) if rows is None else rows)])


def _table(records: Sequence[Record], kind: Kind, rows: Sequence[int]) -> Any:
    schema = _SCHEMAS[kind]
    kept, ids = [], []
    for record in records:
        try:
            ids.append(record_id(record))
            kept.append(record)
        except UnicodeEncodeError:
            kept.append(_faulty(kind, "a text holds half of a surrogate pair (invalid Unicode)"))
            ids.append(record_id(kept[-1]))
    columns: list[Any] = list(zip(*kept, strict=True)) if kept else [()] * (len(schema.names) - 2)
    named = dict(zip(type(_EMPTY[kind])._fields, columns, strict=True), id=ids, row=rows)
    return pa.table([pa.array(named[name], schema.field(name).type) for name in schema.names], schema=schema)


def _frame(tables: list[Any]) -> pd.DataFrame:
    strings = {_TEXT: pd.StringDtype("pyarrow")}
    frame: pd.DataFrame = pa.concat_tables(tables).to_pandas(types_mapper=strings.get)
    return frame


def _faulty(kind: Kind, why: str) -> Record:
    return _EMPTY[kind]._replace(fault=why)


def _converted(rows: Sequence[Row], first: int, name: Format, notes: dict[str, int]) -> Any:
    adapter = ADAPTERS[name]
    records: list[Record] = []
    numbers: list[int] = []
    for number, row in enumerate(rows, first):
        record: Record | None
        try:
            if None in row:  # what the CSV reader names the fields beyond the header's
                raise Fault("the row has more fields than the header")
            record = adapter.convert(row)
        except Fault as fault:
            record = _faulty(adapter.kind, str(fault))
        if record is None:
            notes["ties_dropped"] += 1
        else:
            records.append(record)
            numbers.append(number)
    notes["rows_read"] += len(rows)
    return _table(records, adapter.kind, numbers)


def load(config: DataConfig) -> Loaded:
    """Reads `config.path`, or makes `config.openings` prompts, into a canonical table.

    Raises:
        DataError: the source cannot be read, or its format not be recognised.
    """
    if config.path is None:
        texts = review_openings(config.openings or 0, config.seed)
        frame = to_frame([Prompt(text, False) for text in texts], "prompts")
        return Loaded(frame, "prompts", "prompts", "self-made review openings", {"rows_read": len(texts)})
    return _load_path(config.path, config)


def load_eval(config: DataConfig) -> Loaded | None:
    """Reads `config.eval_path` in full, or None without one. A limit is meant for the training data."""
    return None if config.eval_path is None else _load_path(config.eval_path, config, limited=False)


def _load_path(path: str, config: DataConfig, limited: bool = True) -> Loaded:
    name = None if config.format == "auto" else config.format
    recognised_by = "the recipe set data.format"
    notes = {"rows_read": 0, "ties_dropped": 0}
    tables = []
    for first, rows in read_rows(path, config.split):
        if name is None:
            try:
                name, recognised_by = recognise(rows)
            except DataError as error:
                raise DataError(f"{path}: {error.problem}", error.remedy) from error
        tables.append(_converted(rows, first, name, notes))
        del rows  # else two chunks of Python objects live at once while the next one is read
    assert name is not None  # read_rows yields rows or raises
    frame = _frame(tables)
    if frame.empty:
        raise DataError(
            f"all {notes['rows_read']} rows of {path} are ties, which prefer neither answer",
            "Give rows in which a majority of the annotators prefers one answer",
        )
    if limited and config.limit is not None and config.limit < len(frame):
        keep = np.random.default_rng(config.seed).permutation(len(frame))[: config.limit]
        notes["left_by_limit"] = len(frame) - config.limit
        frame = frame.iloc[np.sort(keep)].reset_index(drop=True)
    notes["faults"] = int((frame["fault"] != "").sum())
    return Loaded(frame, ADAPTERS[name].kind, name, recognised_by, notes)
