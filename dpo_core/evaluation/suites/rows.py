"""Reads the rows of a suite's data file and samples them."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any, TypeVar

from dpo_core.data.files.read import read_rows
from dpo_core.errors import DataError
from dpo_core.images.records import read_record

T = TypeVar("T")
Row = dict[str, Any]


def read_fields(path: Path, fields: Sequence[str]) -> list[Row]:
    """All rows of a file, each with text in every field of `fields`.

    Raises:
        DataError: the file cannot be read, or a row lacks a field.
    """
    rows = [row for _, chunk in read_rows(str(path)) for row in chunk]
    for number, row in enumerate(rows, 1):
        for name in fields:
            value = row.get(name)
            if not (isinstance(value, str) and value.strip()):
                raise DataError(
                    f"row {number} of {path} has no text in the field '{name}'",
                    f"The suite needs the fields {', '.join(fields)}",
                )
    return rows


def category_weight(counts: Counter[str], category: str) -> float:
    """The factor of a prompt's value with which the mean over prompts is the mean over categories.

    Args:
        counts: prompts of each category.
    """
    return counts.total() / len(counts) / counts[category]


def sample_rows(rows: list[Row], limit: int | None, seed: int) -> list[Row]:
    """A seeded sample of at most `limit` rows in the order of the file; all rows if `limit` is None."""
    if limit is None or limit >= len(rows):
        return rows
    return [rows[i] for i in sorted(Random(seed).sample(range(len(rows)), limit))]


def sample_prompts(
    items: Sequence[T], prompt_of: Callable[[T], str], limit: int | None, seed: int
) -> list[T]:
    """At most `limit` items in their order: all items of prompts that a seeded shuffle selects."""
    if limit is None or len(items) <= limit:
        return list(items)
    sizes: dict[str, int] = {}
    for item in items:
        sizes[prompt_of(item)] = sizes.get(prompt_of(item), 0) + 1
    prompts, selected, room = list(sizes), set(), limit
    Random(seed).shuffle(prompts)
    for prompt in prompts:
        if sizes[prompt] <= room:
            selected.add(prompt)
            room -= sizes[prompt]
    return [item for item in items if prompt_of(item) in selected]


def read_records(path: Path) -> list[Row]:
    """The records of GenEval's file, one JSON object a line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error})", "Check the path") from error
    return [{"record": line} for line in lines if read_record(line)]
