"""Rows as a model will see them: their tokens, what is learnt of them, and where they were cut."""

from collections.abc import Iterator
from itertools import groupby
from typing import Any, NamedTuple

import pandas as pd
import typer

from dpo_core.data.tokens.tokenise import Sequence, Tokenise

_SIDES = {"pairs": ("chosen", "rejected"), "unpaired": ("completion",), "prompts": ("prompt",)}
_OPEN, _CLOSE, _CUT = "⟦", "⟧", "✂"


class Shown(NamedTuple):
    """One side of a row."""

    row: int
    side: str
    ids: list[int]
    learnt: list[bool]
    prompt: int
    """Tokens of the prompt."""
    cut_prompt: bool
    cut_answer: bool
    fault: str
    """Why there is nothing to show, else empty."""


def shown(frame: pd.DataFrame, kind: str, tokenise: Tokenise, rows: int) -> Iterator[Shown]:
    """The sides of the first rows, as they are trained on."""
    for row in frame.sort_values("row", kind="stable").head(rows).to_dict("records"):
        fault = str(row["fault"] or "") or tokenise.refusal(row) or ""
        sides = {} if fault else tokenise.sides(row)
        for side in _SIDES[kind]:
            found = fault or sides.get(side) or "it has no tokens"
            if isinstance(found, str):
                why = fault or f"left out of training: {found.replace('_', ' ')}"
                yield Shown(int(row["row"]), side, [], [], 0, False, False, why)
            else:
                yield _shown(row, side, found, tokenise)


def _shown(row: dict[str, Any], side: str, sequence: Sequence, tokenise: Tokenise) -> Shown:
    learnt = sequence.learnt or (True,) * len(sequence.completion)
    whole = tokenise.prompt(row["prompt"], bool(row["chat"]), tools=row.get("tools") or "")
    return Shown(
        int(row["row"]),
        side,
        [*sequence.prompt, *sequence.completion],
        [*(False for _ in sequence.prompt), *learnt],
        len(sequence.prompt),
        len(sequence.prompt) < len(whole),
        sequence.truncated,
        "",
    )


def as_data(one: Shown, tokenise: Tokenise) -> dict[str, Any]:
    """For scripts: `row`, `side`, `ids`, `learnt` (as long as `ids`), `text`; a `fault` if any."""
    text = tokenise.tokenizer.decode(one.ids)
    data = {"row": one.row, "side": one.side, "ids": one.ids, "learnt": one.learnt, "text": text}
    return data | ({"fault": one.fault} if one.fault else {})


def as_text(one: Shown, tokenise: Tokenise) -> str:
    """For people: learnt tokens between ⟦ and ⟧ and in colour, ✂ where something was cut."""
    if one.fault:
        return f"row {one.row} {one.side}: {typer.style(one.fault, fg='red')}"
    stops = tokenise.stop_ids
    ends = "its end is learnt" if one.ids[-1] in stops and one.learnt[-1] else "no end is learnt"
    cuts = [name for name, cut in (("prompt", one.cut_prompt), ("answer", one.cut_answer)) if cut]
    head = f"row {one.row} {one.side}: {len(one.ids)} tokens, {sum(one.learnt)} learnt"
    head += f", {ends}" if any(one.learnt) else ""
    head += f"; cut: {' and '.join(cuts)}" if cuts else ""
    pieces = [_CUT] if one.cut_prompt else []
    for on, group in groupby(zip(one.ids, one.learnt, strict=True), key=lambda pair: pair[1]):
        text = tokenise.tokenizer.decode([token for token, _ in group])
        pieces.append(typer.style(f"{_OPEN}{text}{_CLOSE}", fg="green") if on else text)
    return "\n".join([typer.style(head, bold=True), "".join(pieces) + (_CUT if one.cut_answer else "")])
