"""The rule that needs the chat template: rows that it cannot write so that the answer continues the prompt.

Whether a template writes a row depends on the roles of its turns and on what they carry beside text (calls,
tools, reasoning), so one row of each kind is written. A template may still refuse a text: such rows are left
out, and counted, when the data is tokenised.
"""

import json
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd

from expectations.features import _Array

_ANSWERS = ("chosen", "rejected", "completion")


@runtime_checkable
class Writes(Protocol):
    """What can write a row as training does; `dpo_core.data.tokens.tokenise.Tokenise` is one."""

    def refusal(self, row: dict[str, Any]) -> str | None:
        """Why the chat template cannot write a canonical row."""
        ...


def template_flags(frame: pd.DataFrame, usable: _Array, tokens: Writes) -> tuple[_Array, str]:
    """1 for rows that the template cannot write, (rows,) float32, and why, with an example's row number."""
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
