"""The gate's rule `template`: flags rows of a kind (roles, tools, calls) that the chat template cannot write.

Whether a template can write a row depends on the roles of its turns and their parts beyond text (calls,
tools, reasoning), so one row of each kind is tried. A template may still refuse a text; such rows are left
out and counted during tokenisation.
"""

import json
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd

from expectations.features import _Array

_ANSWERS = ("chosen", "rejected", "completion")


@runtime_checkable
class RowWriter(Protocol):
    """Writes rows as training does; implemented by `dpo_core.data.tokens.tokenise.Tokenise`."""

    def refusal(self, row: dict[str, Any]) -> str | None:
        """The reason why the chat template cannot write a canonical row; None if it can."""
        ...


def template_flags(frame: pd.DataFrame, usable: _Array, tokens: RowWriter) -> tuple[_Array, str]:
    """(rows,) float32: 1 for rows that the template cannot write; and the first reason with its row
    number."""
    seen: dict[Any, str | None] = {}
    flags = np.zeros(len(frame), dtype=np.float32)
    note = ""
    for at, row in enumerate(frame.to_dict("records")):
        if not usable[at]:
            continue
        kind = _kind(row)
        if kind not in seen:
            seen[kind] = why = tokens.refusal(row)
            if why and not note:
                note = f"row {row['row']}: {why}"
        flags[at] = bool(seen[kind])
    return flags, note


def _kind(row: dict[str, Any]) -> Any:
    if not row["chat"]:
        return bool(row["prompt"])
    answers = [row[name] for name in _ANSWERS if name in row] if row.get("answer_chat") else []
    return bool(row.get("tools")), tuple(_shape(text) for text in [row["prompt"], *answers])


def _shape(turns: str) -> Any:
    return tuple((turn.get("role"), *sorted(k for k, v in turn.items() if v)) for turn in json.loads(turns))
