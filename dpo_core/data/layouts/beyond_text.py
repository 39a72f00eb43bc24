"""Finds parts of canonical rows beyond plain turns (tools, calls, reasoning) for the template check."""

import json
from typing import Any

KEYS = ("tool_calls", "reasoning_content", "name", "tool_call_id")
_ANSWERS = ("chosen", "rejected", "completion")


def beyond_text(row: dict[str, Any]) -> list[str]:
    """The parts of a canonical row beside the texts of its turns, as `tools`, `tool_calls of prompt`."""
    extras = ["tools"] if row.get("tools") else []
    parts = ["prompt"] if row["chat"] and any(f'"{key}":' in row["prompt"] for key in KEYS) else []
    parts += [name for name in _ANSWERS if name in row and row.get("answer_chat")]
    for part in parts:
        turns = json.loads(row[part])
        extras += [f"{key} of {part}" for key in KEYS if any(key in turn for turn in turns)]
        if part != "prompt" and len(turns) > 1:
            extras.append(f"several turns of {part}")
    return extras
