"""Parses columns that contain JSON or Python literals as text, as in CSV exports and pandas output."""

import ast
import json
import re
from collections.abc import Sequence
from typing import Any

# Longer texts are not exported messages; they are not given to the slower parser.
_LONGEST = 2**20
_SPEAKER = ("role", "from")
# Columns whose lists do not contain messages.
_LISTS = ("answers", "completions", "responses", "candidates", "generations", "summaries", "info", "question")


def parse_source(text: str) -> Any:
    """The value of a JSON or Python literal; None if the text is neither a list nor an object."""
    bare = text.strip()
    if not (bare.startswith(("[", "{")) and bare.endswith(("]", "}"))):
        return None
    try:
        return json.loads(bare)
    except (ValueError, RecursionError):
        pass
    if len(bare) > _LONGEST:
        return None
    # pandas writes a column of lists as numpy's repr, which has no commas between objects.
    for source in (bare, re.sub(r"\}\s+\{", "}, {", bare)):
        try:
            value = ast.literal_eval(source)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
        return value if isinstance(value, list | dict) else None
    return None


def is_conversation(value: object) -> bool:
    """Whether a value is a message or a list of messages."""
    listed = [value] if isinstance(value, dict) else value
    if not isinstance(listed, list) or not listed:
        return False
    return all(
        isinstance(m, dict)
        and any(isinstance(m.get(key), str) for key in _SPEAKER)
        and bool({"content", "value", "tool_calls"} & m.keys())
        for m in listed
    )


def columns_of_source(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The columns in which at least half of the texts are lists or objects written as source."""
    columns = []
    for name in dict.fromkeys(key for row in rows for key in row if isinstance(key, str)):
        texts = [row[name] for row in rows if isinstance(row.get(name), str) and row[name].strip()]
        values = [parse_source(value) for value in texts]
        hits = sum(
            is_conversation(v) or (name in _LISTS and isinstance(v, list | dict) and bool(v)) for v in values
        )
        if texts and 2 * hits >= len(texts):
            columns.append(name)
    return columns
