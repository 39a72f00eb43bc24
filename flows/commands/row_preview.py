"""Formats rows as a model will see them: their tokens, which are learnt, and where they are cut."""

from collections.abc import Iterator
from itertools import groupby
from typing import Any, NamedTuple

import pandas as pd
import typer

from dpo_core.data.tokens.sequences import TokenSequence
from dpo_core.data.tokens.tokenise import Tokenise

_SIDES = {"pairs": ("chosen", "rejected"), "unpaired": ("completion",), "prompts": ("prompt",)}
_OPEN, _CLOSE, _CUT = "⟦", "⟧", "✂"


class RowPreview(NamedTuple):
    """One side of a row."""

    row: int
    side: str
    ids: list[int]
    learnt: list[bool]
    prompt: int
    """Number of tokens of the prompt."""
    cut_prompt: bool
    cut_answer: bool
    fault: str
    """Why the row has no tokens; else empty."""


def shown(frame: pd.DataFrame, kind: str, tokenise: Tokenise, rows: int) -> Iterator[RowPreview]:
    """The sides of the first rows, as training reads them."""
    for row in frame.sort_values("row", kind="stable").head(rows).to_dict("records"):
        fault = str(row["fault"] or "") or tokenise.refusal(row) or ""
        sides = {} if fault else tokenise.sides(row)
        for side in _SIDES[kind]:
            tokens = fault or sides.get(side) or "it has no tokens"
            if isinstance(tokens, str):
                reason = fault or f"left out of training: {tokens.replace('_', ' ')}"
                yield RowPreview(int(row["row"]), side, [], [], 0, False, False, reason)
            else:
                yield _shown(row, side, tokens, tokenise)


def _shown(row: dict[str, Any], side: str, sequence: TokenSequence, tokenise: Tokenise) -> RowPreview:
    learnt = sequence.learnt or (True,) * len(sequence.completion)
    uncut = tokenise.prompt(row["prompt"], bool(row["chat"]), tools=row.get("tools") or "")
    return RowPreview(
        int(row["row"]),
        side,
        [*sequence.prompt, *sequence.completion],
        [*(False for _ in sequence.prompt), *learnt],
        len(sequence.prompt),
        len(sequence.prompt) < len(uncut),
        sequence.truncated,
        "",
    )


def as_data(side: RowPreview, tokenise: Tokenise) -> dict[str, Any]:
    """For scripts: `row`, `side`, `ids`, `learnt` (as long as `ids`), `text`, and `fault` if any."""
    text = tokenise.tokenizer.decode(side.ids)
    data = {"row": side.row, "side": side.side, "ids": side.ids, "learnt": side.learnt, "text": text}
    return data | ({"fault": side.fault} if side.fault else {})


def as_text(side: RowPreview, tokenise: Tokenise) -> str:
    """For people: learnt tokens between ⟦ and ⟧ and in colour, ✂ where something is cut."""
    if side.fault:
        return f"row {side.row} {side.side}: {typer.style(side.fault, fg='red')}"
    stops = tokenise.stop_ids
    ends = "its end is learnt" if side.ids[-1] in stops and side.learnt[-1] else "no end is learnt"
    cuts = [name for name, cut in (("prompt", side.cut_prompt), ("answer", side.cut_answer)) if cut]
    head = f"row {side.row} {side.side}: {len(side.ids)} tokens, {sum(side.learnt)} learnt"
    head += f", {ends}" if any(side.learnt) else ""
    head += f"; cut: {' and '.join(cuts)}" if cuts else ""
    pieces = [_CUT] if side.cut_prompt else []
    for on, group in groupby(zip(side.ids, side.learnt, strict=True), key=lambda pair: pair[1]):
        text = tokenise.tokenizer.decode([token for token, _ in group])
        pieces.append(typer.style(f"{_OPEN}{text}{_CLOSE}", fg="green") if on else text)
    return "\n".join([typer.style(head, bold=True), "".join(pieces) + (_CUT if side.cut_answer else "")])
