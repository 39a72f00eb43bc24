"""The canonical tables of pairs, unpaired rows and prompts, and loading one source into such a table.

Bad rows are kept with a reason in `fault` and empty texts; the data gate counts them and decides.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_type_hints

import numpy as np
import pandas as pd
import pyarrow as pa

from dpo_core.data.config import DataConfig, Format, SourceConfig
from dpo_core.data.convert import Converter, faulty_record
from dpo_core.data.files.read import names_splits, read_rows
from dpo_core.data.layouts.fields import Kind, PairFields, PromptFields, Record, Unpaired
from dpo_core.system import digest_text

_TEXT = pa.large_string()
_TYPES: dict[Any, Any] = {str: _TEXT, bool: pa.bool_(), float | None: pa.float64()}
_RECORDS: dict[Kind, Any] = {"pairs": PairFields, "unpaired": Unpaired, "prompts": PromptFields}
_SCHEMAS: dict[Kind, Any] = {
    kind: pa.schema(
        {"id": _TEXT, "row": pa.int64()} | {name: _TYPES[t] for name, t in get_type_hints(record).items()}
    )
    for kind, record in _RECORDS.items()
}
PAIR_COLUMNS: list[str] = _SCHEMAS["pairs"].names
"""id (sha256 of the content), row (source row, from 1), prompt (text, or compact JSON messages if chat),
chat, chosen, rejected, *_ended (the answer is complete, so EOS follows it), agreement (share of votes for
the chosen answer, empty if unknown), tools (JSON list of functions, "" = none), answer_chat (the answers are
compact JSON messages: tool calls, reasoning or several turns), margin (difference of the scores, empty if
unknown), source (the set of a mixture, else ""), fault ("" = none)."""
UNPAIRED_COLUMNS: list[str] = _SCHEMAS["unpaired"].names
PROMPT_COLUMNS: list[str] = [name for name in _SCHEMAS["prompts"].names if name != "metadata"]
"""Prompts of images also have `metadata`, where one has any."""


@dataclass(frozen=True)
class Loaded:
    """A canonical table with its format and remarks about reading it."""

    frame: pd.DataFrame
    kind: Kind
    format: Format
    recognised_by: str
    """A sentence that says how the format was recognised, or that the recipe set it."""
    notes: dict[str, int] = field(default_factory=dict)
    """Counts: rows_read, ties_dropped, faults, and left_by_limit if a limit applied."""
    remarks: list[str] = field(default_factory=list)
    """Sentences about conversions that were made and columns that were not read."""


def record_id(record: Record) -> str:
    """SHA-256 (hex) of a record's texts and flags, without votes and row number.

    Raises:
        UnicodeEncodeError: a text contains half of a surrogate pair, which no file can store.
    """
    # The lengths distinguish ("ab", "c") from ("a", "bc").
    match record:
        case PairFields():
            lengths = f"{len(record.prompt)},{len(record.chosen)}"
            flags = f"{record.chat:d}{record.chosen_ended:d}{record.rejected_ended:d}"
            content = f"pair {lengths},{flags}\n{record.prompt}{record.chosen}{record.rejected}"
        case Unpaired():
            flags = f"{record.chat:d}{record.ended:d}{record.label:d}"
            content = f"unpaired {len(record.prompt)},{flags}\n{record.prompt}{record.completion}"
        case PromptFields():
            content = f"prompt {record.chat:d}\n{record.prompt}"
            content += f"\nmetadata {record.metadata}" if record.metadata else ""
    # Added only if present, so that the ids of other rows are the same as in earlier versions.
    if record.tools:
        content += f"\ntools {record.tools}"
    if not isinstance(record, PromptFields) and record.answer_chat:
        content += "\nchat answers"
    content.encode()
    return digest_text(content)


def to_frame(
    records: Iterable[Record], kind: Kind = "pairs", rows: Sequence[int] | None = None
) -> pd.DataFrame:
    """The canonical table of records, with ids and row numbers (default: 1, 2, ...)."""
    listed = list(records)
    return _frame([_table(listed, kind, range(1, len(listed) + 1) if rows is None else rows)])


def _table(records: Sequence[Record], kind: Kind, rows: Sequence[int]) -> Any:
    schema = _SCHEMAS[kind]
    checked, ids = [], []
    for record in records:
        try:
            ids.append(record_id(record))
            checked.append(record)
        except UnicodeEncodeError:
            checked.append(faulty_record(kind, "a text holds half of a surrogate pair (invalid Unicode)"))
            ids.append(record_id(checked[-1]))
    columns: list[Any] = list(zip(*checked, strict=True)) if checked else [()] * (len(schema.names) - 2)
    values = dict(zip(_RECORDS[kind]._fields, columns, strict=True), id=ids, row=rows)
    return pa.table([pa.array(values[name], schema.field(name).type) for name in schema.names], schema=schema)


def _frame(tables: list[Any]) -> pd.DataFrame:
    strings = {_TEXT: pd.StringDtype("pyarrow")}
    frame: pd.DataFrame = pa.concat_tables(tables).to_pandas(types_mapper=strings.get)
    if "metadata" in frame and (frame["metadata"] == "").all():
        return frame.drop(columns="metadata")
    return frame


def load_source(source: SourceConfig, config: DataConfig, *, evaluation: bool = False) -> Loaded:
    """The table of one file, folder or hub data set.

    Raises:
        DataError: it cannot be read, its format is not recognised, or all rows are ties.
    """
    by_column = source.split is not None and not names_splits(source.path)
    converter = Converter(source, config.pairs, by_column=by_column, images=config.images)
    files: list[str] = []
    tables = []
    for first, rows in read_rows(source.path, source.split, evaluation=evaluation, remarks=files):
        records, numbers = converter.convert(rows, first)
        tables.append(_table(records, converter.kind, numbers))
        del rows  # otherwise two chunks of Python objects are in memory while the next one is read
    records, numbers = converter.rest()
    tables.append(_table(records, converter.kind, numbers))
    frame = _frame(tables)
    if converter.assembled:
        frame = frame.sort_values("row", kind="stable", ignore_index=True)
    if frame.empty:
        raise converter.nothing()
    converter.notes["faults"] = int((frame["fault"] != "").sum())
    remarks = files + converter.remarks()
    return Loaded(frame, converter.kind, converter.format, converter.recognised_by, converter.notes, remarks)


def subsample(loaded: Loaded, limit: int | None, seed: int) -> Loaded:
    """A seeded sample of `limit` rows in file order; the table itself if it has no more rows."""
    frame, notes = loaded.frame, dict(loaded.notes)
    if limit is None or limit >= len(frame):
        return loaded
    keep = np.random.default_rng(seed).permutation(len(frame))[:limit]
    # Count faults again, among the remaining rows.
    notes.pop("faults", None)
    notes["left_by_limit"] = len(frame) - limit
    frame = frame.iloc[np.sort(keep)].reset_index(drop=True)
    notes["faults"] = int((frame["fault"] != "").sum())
    return replace(loaded, frame=frame, notes=notes)
