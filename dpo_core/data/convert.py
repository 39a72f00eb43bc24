"""Converts the rows of one source to canonical records, and collects faults and remarks about them."""

from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from dpo_core.data.config import Format, Pairing, SourceConfig
from dpo_core.data.formats import ADAPTERS, SAMPLE_ROWS, recognise
from dpo_core.data.layouts.fields import (
    Fault,
    ImageFolder,
    Kind,
    PairFields,
    PromptFields,
    Ranked,
    Record,
    Row,
    SourceRow,
    Unpaired,
    unreadable,
)
from dpo_core.data.layouts.messages import SYSTEM_NAMES
from dpo_core.data.layouts.rankings import pairs_of
from dpo_core.data.layouts.structured import columns_of_source, is_conversation, parse_source
from dpo_core.errors import DataError
from dpo_core.images.files import names_image, pair_fault

# Columns that change the meaning of a row: it is an error if they are not read.
_MATTER = {
    *SYSTEM_NAMES, "tools", "functions", "tool_calls", "reasoning_content", "history", "initial_reason_steps",
    "image", "images", "audio", "audios", "video", "videos",
}  # fmt: skip
# Columns that do not: names, numbers and origins of rows, scores that no format uses.
_HARMLESS = (
    "id", "idx", "index", "uid", "uuid", "source", "dataset", "origin", "subset", "category", "categories",
    "task", "lang", "language", "score", "model", "models", "timestamp", "tstamp", "date", "created_at",
    "url", "license", "metadata", "meta", "tag", "tags", "turns", "judge", "split",
)  # fmt: skip
_HARMLESS_ENDS = ("_id", "-id", "_ids", "_model", "-model", "_score", "-score", "_source", "_sha256", "_hash")
_HARMLESS_STARTS = ("num_", "score_", "model_")

_EMPTY: dict[Kind, Record] = {
    "pairs": PairFields("", False, "", ""),
    "unpaired": Unpaired("", False, "", False),
    "prompts": PromptFields("", False),
}


def faulty_record(kind: Kind, why: str) -> Record:
    """An empty record with the reason why its row cannot be used."""
    return _EMPTY[kind]._replace(fault=why)


def with_sound_images(record: Record) -> Record:
    """The record, or a fault where it is a pair of images that breaks one of their rules."""
    if not isinstance(record, PairFields) or not names_image(record.chosen):
        return record
    fault = pair_fault(record.chosen, record.rejected)
    return faulty_record("pairs", fault) if fault else record


class Converter:
    """Converts the chunks of one source in order. The first chunk decides the format of all."""

    def __init__(
        self,
        source: SourceConfig,
        pairing: Pairing,
        *,
        by_column: bool = False,
        images: str | None = None,
    ) -> None:
        self.source, self.pairing = source, pairing
        place = Path(images or source.path).expanduser()
        self.images = ImageFolder(place.parent if place.is_file() else place, keeps=images is not None)
        self.by_column = by_column
        """Whether the split of a row is given by its column `split` instead of its file."""
        self.name: Format | None = None if source.format == "auto" else source.format
        self.recognised_by = "the recipe set data.format"
        self.notes = {"rows_read": 0, "ties_dropped": 0}
        self._remarks: Counter[str] = Counter()
        self._unread: Counter[str] = Counter()
        self._kinds: Counter[bool] = Counter()
        self._parts: list[tuple[int, Any]] = []
        self._as_source: list[str] = []
        self._as_chat = False
        self._splits: Counter[str] = Counter()
        self._begun = False

    @property
    def format(self) -> Format:
        """The format; known after the first rows."""
        assert self.name is not None  # read_rows yields rows or raises
        return self.name

    @property
    def kind(self) -> Kind:
        """The kind of records."""
        return ADAPTERS[self.format].kind

    @property
    def assembled(self) -> bool:
        """Whether records can only be made from all rows together."""
        return ADAPTERS[self.format].assemble is not None

    def convert(self, rows: Sequence[Row], first: int) -> tuple[list[Record], list[int]]:
        """The records of a chunk with the numbers of their rows; `first` is that of the chunk's first row."""
        if not self._begun:
            self._require_columns(rows)
        rows = [self._renamed(row) for row in rows]
        if not self._begun:
            self._begin(rows)
        # If one row has a system text, all become chats: a null in that column is a chat without system turn.
        self._as_chat = self._as_chat or any(
            isinstance(row.get(name), str) and bool(row[name]) for row in rows for name in SYSTEM_NAMES
        )
        records: list[Record] = []
        numbers: list[int] = []
        for number, row in enumerate(rows, first):
            if self.by_column and row.get("split") != self.source.split and not unreadable(row):
                self.notes["of_other_splits"] = self.notes.get("of_other_splits", 0) + 1
                continue
            for record, where in self._of_row(row, number):
                records.append(record)
                numbers.append(where)
        self.notes["rows_read"] += len(rows)
        return records, numbers

    def rest(self) -> tuple[list[Record], list[int]]:
        """The records that are made from all rows together."""
        assemble = ADAPTERS[self.format].assemble
        if assemble is None:
            return [], []
        made = [pair for ranked in assemble(self._parts, self._remarks) for pair in self._pairs(ranked)]
        for record, _ in made:
            self._kinds[record.chat] += 1
        return [record for record, _ in made], [number for _, number in made]

    def _begin(self, rows: Sequence[Row]) -> None:
        self._begun = True
        sample = [row for row in rows[:SAMPLE_ROWS] if not unreadable(row)]
        self._as_source = columns_of_source(sample)
        if self.name is None:
            try:
                self.name, self.recognised_by = recognise([self._parsed(row)[0] for row in sample])
            except DataError as error:
                raise DataError(f"{self.source.path}: {error.problem}", error.remedy) from error
        adapter = ADAPTERS[self.name]
        if self.pairing != "best_worst" and not adapter.ranked:
            raise DataError(
                f"data.pairs has no effect, because {self.source.path} ({self.name}) has no rankings",
                "Remove data.pairs",
            )
        if adapter.note:
            self._remarks[adapter.note] = 0
        if self.by_column and all(row.get("split") != self.source.split for row in rows):
            raise DataError(
                f"there is no split {self.source.split} in {self.source.path}: neither file names nor the "
                "column split contain it",
                "Remove data.split (or data.eval_split), or give the path of the split's file",
            )

    def _renamed(self, row: Row) -> Row:
        """The row with the recipe's columns renamed to the names of the formats."""
        columns = self.source.columns
        if not columns or unreadable(row):
            return row
        used = set(columns.values())
        renamed = {key: value for key, value in row.items() if key not in used and key not in columns}
        return renamed | {name: _at(row, column) for name, column in columns.items()}

    def _require_columns(self, rows: Sequence[Row]) -> None:
        """Refuse a name in `data.columns` that no row has; otherwise every row would be reported."""
        for name, column in (self.source.columns or {}).items():
            if all(_at(row, column) is None for row in rows):
                names = sorted({str(key) for row in rows[:SAMPLE_ROWS] for key in row})
                raise DataError(
                    f"data.columns: no row of {self.source.path} has a column {column} (for {name})",
                    f"The columns are {', '.join(names)}",
                )

    def _parsed(self, row: Row) -> tuple[Row, list[str]]:
        """The row with lists and objects parsed from text, and the names of the parsed columns."""
        values = {name: parse_source(row[name]) for name in self._as_source if isinstance(row.get(name), str)}
        parsed = {name: value for name, value in values.items() if value is not None}
        return (row | parsed if parsed else row), list(parsed)

    def _of_row(self, row: Row, number: int) -> list[tuple[Record, int]]:
        adapter = ADAPTERS[self.format]
        try:
            converted = self._read(row, number)
        except Fault as fault:
            return [(faulty_record(adapter.kind, str(fault)), number)]
        except RecursionError:
            return [(faulty_record(adapter.kind, "the row is nested too deeply"), number)]
        except Exception as error:
            why = f"the row cannot be read ({type(error).__name__}: {str(error)[:100]})"
            return [(faulty_record(adapter.kind, why), number)]
        if adapter.assemble is not None:
            self._parts.append((number, converted))
            return []
        if isinstance(converted, Ranked):
            made = self._pairs(converted)
        elif converted is None:
            self.notes["ties_dropped"] += 1
            made = []
        else:
            made = [(converted, number)]
        made = [(with_sound_images(record), where) for record, where in made]
        for record, _ in made:
            self._kinds[record.chat] += 1
        return made

    def _read(self, row: Row, number: int) -> Any:
        """The adapter's conversion of a row.

        Raises:
            Fault: the row cannot be read, or has a column that changes its meaning and is not read.
        """
        if why := unreadable(row):
            raise Fault(why)
        readable, parsed = self._parsed(row) if self._as_source else (row, [])
        for name in self._as_source:
            if name not in parsed and str(row.get(name) or "").lstrip().startswith(("[", "{")):
                raise Fault(f"{name} holds JSON or Python source that cannot be parsed")
        source = SourceRow(readable, number, as_chat=self._as_chat, images=self.images)
        converted = ADAPTERS[self.format].convert(source)
        unread = source.unread()
        for name in unread:
            if name in _MATTER:
                raise Fault(f"{name} is there, and rows of the format {self.format} are read without it")
        self._note(source, row, parsed, unread)
        return converted

    def _pairs(self, ranked: Ranked) -> list[tuple[Record, int]]:
        made: list[tuple[Record, int]] = list(pairs_of(ranked, self.pairing))
        if len(ranked.answers) < 2:
            self.notes["single_answers"] = self.notes.get("single_answers", 0) + 1
        elif not made:
            self.notes["ties_dropped"] += 1
        return made

    def _note(self, source: SourceRow, row: Row, parsed: list[str], unread: list[str]) -> None:
        self._remarks.update(dict.fromkeys(source.remarks, 1))
        for name in parsed:
            self._remarks[f"{name} holds JSON or Python source, which was parsed"] += 1
        for name in unread:
            if name == "split" and isinstance(row[name], str):
                self._splits[row[name]] += 1
            if not _harmless(str(name)):
                self._unread[str(name)] += 1
        for name in ("prompt", "chosen", "rejected", "completion"):
            value = row.get(name)
            if not isinstance(value, str) or name in parsed or not value.lstrip().startswith(("[", "{")):
                continue
            if is_conversation(parse_source(value)):
                self._remarks[f"{name} looks like messages written as text, and was read as text"] += 1

    def remarks(self) -> list[str]:
        """Sentences for the user about how the rows were read."""
        remarks = [f"{text}{f' ({count} rows)' if count else ''}" for text, count in self._remarks.items()]
        if self._unread:
            total = self.notes["rows_read"]
            names = (f"{n}{f' ({c} rows)' if c < total else ''}" for n, c in sorted(self._unread.items()))
            remarks.append(f"columns not read: {', '.join(names)}")
        if len(self._splits) > 1:
            counts = ", ".join(f"{name} ({count} rows)" for name, count in self._splits.most_common(6))
            remarks.append(f"the column split was not read; rows of all splits were kept: {counts}")
        if self._kinds[True] and self._kinds[False]:
            remarks.append(
                f"{self._kinds[True]} prompts are conversations and {self._kinds[False]} plain text: with "
                "tokens.template=auto only the conversations use the chat template"
            )
        return remarks

    def nothing(self) -> DataError:
        """The error for a source without any usable record."""
        count = self.notes["rows_read"]
        if self.assembled or self.notes.get("single_answers"):
            return DataError(
                f"the {count} rows of {self.source.path} were read as {self.format}, but no prompt has two "
                "answers with different scores or ranks",
                "Use data with several answers per prompt",
            )
        return DataError(
            f"all {count} rows of {self.source.path} are ties, without a preferred answer",
            "Use data in which one answer is preferred, by most annotators or by its score",
        )


def _at(row: Row, column: str) -> Any:
    """The value of a column, or of a field in an object column: `question.full_text`."""
    if column in row or "." not in column:
        return row.get(column)
    outer, _, inner = column.partition(".")
    value = row.get(outer)
    return _at(value, inner) if isinstance(value, dict) else None


@cache
def _harmless(name: str) -> bool:
    name = name.lower()
    return name in _HARMLESS or name.endswith(_HARMLESS_ENDS) or name.startswith(_HARMLESS_STARTS)
