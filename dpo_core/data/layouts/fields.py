"""Row and record types, and typed access to the fields of a row.

An adapter raises `Fault` for a row that it cannot use. Such a row is kept with the reason in `fault`.
"""

import json
import math
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dpo_core.data.row import UNREADABLE, Row

Kind = Literal["pairs", "unpaired", "prompts"]


class Fault(Exception):
    """A row cannot be used; the message is the reason."""


class PairFields(NamedTuple):
    """A prompt with a chosen and a rejected answer. `*_ended`: the answer is complete, not cut off.
    `agreement`: share of votes for the chosen answer, None if unknown. `tools`: JSON list of the functions
    that the model may call, "" if there are none. `answer_chat`: the answers are JSON lists of messages.
    `margin`: score of the chosen answer minus that of the rejected one, None without scores."""

    prompt: str
    chat: bool
    chosen: str
    rejected: str
    chosen_ended: bool = True
    rejected_ended: bool = True
    agreement: float | None = None
    tools: str = ""
    answer_chat: bool = False
    margin: float | None = None
    source: str = ""
    fault: str = ""


class Unpaired(NamedTuple):
    """A prompt with one answer, labelled desirable (True) or undesirable."""

    prompt: str
    chat: bool
    completion: str
    label: bool
    ended: bool = True
    tools: str = ""
    answer_chat: bool = False
    source: str = ""
    fault: str = ""


class PromptFields(NamedTuple):
    """A prompt without an answer."""

    prompt: str
    chat: bool
    tools: str = ""
    source: str = ""
    fault: str = ""
    metadata: str = ""
    """What a reward of images reads beside the prompt, as JSON; "" for none."""


Record = PairFields | Unpaired | PromptFields


class Ranked(NamedTuple):
    """A prompt with any number of answers, each `(answer, score, number of its row)`; higher is better.

    `scored` is False if the scores are ranks, whose differences have no meaning."""

    prompt: str
    chat: bool
    tools: str
    answers: list[tuple[str, float, int]]
    scored: bool = True


class ImageFolder(NamedTuple):
    """The folder in which paths of images begin."""

    path: Path
    keeps: bool
    """Whether images that rows hold as bytes are kept there."""


class SourceRow(Row):
    """A row that records which of its columns were read, and collects remarks."""

    def __init__(
        self, row: Row, number: int = 0, *, as_chat: bool = False, images: "ImageFolder | None" = None
    ) -> None:
        super().__init__(row)
        self.number = number
        self.images = images or ImageFolder(Path(), keeps=False)
        self.as_chat = as_chat
        """Whether a text prompt becomes a user turn, because other rows of the set have a system text."""
        self.was_read: set[str] = set()
        self.remarks: list[str] = []

    def get(self, key: str, default: Any = None) -> Any:
        self.was_read.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.was_read.add(key)
        return super().__getitem__(key)

    def unread(self) -> list[str]:
        """The columns that are not empty and were not read."""
        return [key for key, value in self.items() if key not in self.was_read and not is_empty(value)]


def remark(row: Row, text: str) -> None:
    """Add a remark, which is reported to the user after reading."""
    if isinstance(row, SourceRow):
        row.remarks.append(text)


def is_empty(value: object) -> bool:
    """Whether a value is null, NaN, or an empty text, list or object."""
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, str | list | dict | tuple) and not value)


def type_of(value: object) -> str:
    """The JSON name of a value's type."""
    names = {bool: "boolean", int: "number", float: "number", str: "string", list: "list", dict: "object"}
    return names.get(type(value), type(value).__name__)


def text(row: Row, name: str) -> str:
    """A required string field.

    Raises:
        Fault: it is missing or not a string.
    """
    value = row.get(name)
    if value is None:
        raise Fault(f"{name} is missing")
    if not isinstance(value, str):
        raise Fault(f"{name} is a JSON {type_of(value)}, not a string")
    return value


def optional_text(row: Row, *names: str) -> tuple[str, str]:
    """The first field that is not empty, and its name; "" if all are empty."""
    for name in names:
        if not is_empty(row.get(name)):
            return text(row, name), name
    return "", names[0]


_TRUTH = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def is_flag(value: object) -> bool:
    """Whether a value can be read as true or false; CSV files contain words, pandas 1.0 or 0.0."""
    return not isinstance(value, list | dict) and str(value).strip().lower() in _TRUTH


def flag(row: Row, name: str) -> bool:
    """A truth value.

    Raises:
        Fault: it is missing or neither true nor false.
    """
    value = row.get(name)
    if is_empty(value):
        raise Fault(f"{name} is missing")
    if not is_flag(value):
        raise Fault(f"{name} is neither true nor false, nor 1 or 0")
    return _TRUTH[str(value).strip().lower()]


def number(row: Row, name: str) -> float | None:
    """An optional number, also as text as in CSV files; None if the field is empty.

    Raises:
        Fault: it is not a number, infinite, or too large for a float.
    """
    value = row.get(name)
    if is_empty(value):
        return None
    try:
        parsed = math.inf if isinstance(value, bool | list | dict) else float(value or 0)
    except (TypeError, ValueError, OverflowError):
        parsed = math.inf
    if math.isnan(parsed):
        return None
    if math.isinf(parsed):
        raise Fault(f"{name} is {str(value)[:20]!r}, not a number")
    return parsed


def required_number(row: Row, name: str) -> float:
    """A required number.

    Raises:
        Fault: it is missing or not a number.
    """
    value = number(row, name)
    if value is None:
        raise Fault(f"{name} is missing")
    return value


def objects(value: object, name: str) -> list[Row]:
    """A list of objects, or an object of equally long lists as in Parquet's nested columns.

    Raises:
        Fault: it is neither.
    """
    if isinstance(value, dict) and value and all(isinstance(v, list) or v is None for v in value.values()):
        columns = {key: column for key, column in value.items() if column is not None}
        if len({len(column) for column in columns.values()}) == 1:
            return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
    if not isinstance(value, list):
        raise Fault(f"{name} is missing" if value is None else f"{name} is a {type_of(value)}, not a list")
    for item in value:
        if not isinstance(item, dict):
            raise Fault(f"{name} holds a {type_of(item)} where an object is expected")
    return value


def has(row: Row, *names: str) -> bool:
    """Whether none of these fields is null."""
    return all(row.get(name) is not None for name in names)


def compact(value: object) -> str:
    """Compact JSON.

    Raises:
        ValueError: the value contains NaN or infinity.
    """
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def unreadable(row: Row) -> str:
    """The reason why the file's reader could not read the row; "" if it could."""
    if None in row:  # the CSV reader's key for fields beyond the header
        return "the row has more fields than the header"
    return str(row.get(UNREADABLE, ""))
