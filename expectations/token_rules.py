"""The rules that need the tokenizer: the token budget, answers equal by truncation, and the chat template.

Tokenising a million rows takes minutes, but bytes decide nearly all rows. A token has at least one byte, so a
row whose bytes fit the budget fits it in tokens, and two answers can keep equal tokens only if they begin
with at least that many equal bytes. The other rows are tokenised exactly as in training, or if there are too
many, a seeded sample of them. The bounds hold for lossless tokenizers (byte-level or byte-fallback BPE); a
tokenizer that maps different texts to one unknown token can hide a pair from the second rule.

Whether a template can write a row depends on the roles of its turns and their parts beyond text (calls,
tools, reasoning), so one row of each kind is tried. A template may still refuse a text; such rows are left
out and counted during tokenisation.
"""

import json
from typing import Any

import numpy as np
import pandas as pd

from dpo_core.data.tokens.chat_template import TemplateError
from dpo_core.data.tokens.tokenise import Tokenise
from expectations.features import Features, Tokenisation, _Array
from expectations.rules import Subject

_ANSWERS = ("chosen", "rejected", "completion")


def _judge_row(row: dict[str, object], tokenisation: Tokenisation, subject: Subject) -> tuple[bool, bool]:
    """(over the budget, answers equal after truncation) of one row."""
    tokens, limit = tokenisation.tokens, tokenisation.limit(subject)
    assert tokens is not None
    assert limit is not None
    text, chat, tools = str(row["prompt"]), bool(row["chat"]), str(row.get("tools") or "")
    about = text, chat, tools, bool(row.get("answer_chat"))
    prompt = tokens.prompt(text, chat, tools=tools)
    if subject == "prompts":
        return len(prompt) > limit, False
    if subject == "unpaired":
        completion = tokens.completion(str(row["completion"]), bool(row["ended"]), *about)
        return len(prompt) + len(completion) > limit, False
    chosen, rejected = (
        tokens.completion(str(row[side]), bool(row[f"{side}_ended"]), *about)
        for side in ("chosen", "rejected")
    )
    if len(prompt) + max(len(chosen), len(rejected)) <= limit:
        return False, False
    if tokenisation.max_prompt_length is not None:
        prompt = tokens.prompt(text, chat, tokenisation.max_prompt_length, tools)
    kept = max(limit - len(prompt), 0)
    return True, list(chosen[:kept]) == list(rejected[:kept])


def token_flags(
    frame: pd.DataFrame,
    features: Features,
    tokenisation: Tokenisation,
    subject: Subject,
    *,
    max_candidates: int,
    seed: int,
) -> tuple[dict[str, _Array], dict[str, int]]:
    """Columns over_long and, for pairs, identical_after_truncation: 1 offends, 0 does not, NaN not checked.

    With more than `max_candidates` undecided rows, a seeded share of ALL rows is checked, including decided
    ones, so that the rate over the checked rows is an unbiased estimate of the set's rate.

    Returns:
        The columns, each (rows,) float32, and the number of checked rows for each estimated column.
    """
    wanted = {"over_long": features.maybe_over}
    if subject == "pairs":
        wanted["identical_after_truncation"] = features.maybe_equal
    columns: dict[str, _Array] = {}
    estimated: dict[str, int] = {}
    for name, maybe in wanted.items():
        columns[name] = np.zeros(len(frame), dtype=np.float32)
        count = int(maybe.sum())
        if count > max_candidates:
            looked = np.random.default_rng(seed).random(len(frame)) < max_candidates / count
            columns[name][~looked] = np.nan
            estimated[name] = int(looked.sum())
    look = np.zeros(len(frame), dtype=bool)
    for name, maybe in wanted.items():
        look |= maybe & ~np.isnan(columns[name])
    positions = np.flatnonzero(look)
    for at, row in zip(positions.tolist(), frame.iloc[positions].to_dict("records"), strict=True):
        try:
            hits = _judge_row(row, tokenisation, subject)
        except TemplateError:  # counted by the rule `template`, or during tokenisation
            continue
        for name, hit in zip(wanted, hits, strict=False):
            if hit and wanted[name][at] and not np.isnan(columns[name][at]):
                columns[name][at] = 1.0
    return columns, estimated


def template_flags(frame: pd.DataFrame, usable: _Array, tokens: Tokenise) -> tuple[_Array, str]:
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
