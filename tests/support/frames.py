"""Clean canonical frames, to be broken on purpose."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd

from expectations.report import Finding, GateReport

_TOPICS = ["rivers", "bread", "stars", "trains", "music", "gardens", "bridges", "clocks", "maps", "wool"]


def row_number(index: int) -> int:
    """Source row numbers differ from positions, so that a mix-up of the two fails a test."""
    return 10 * index + 3


def clean_prompts(rows: int = 40, chat: bool = False) -> pd.DataFrame:
    """Distinct English prompts; every fifth row is in the eval split."""
    texts = [f"What do you know about the {_TOPICS[i % 10]} of town number {i}?" for i in range(rows)]
    if chat:
        turns = [[{"role": "user", "content": t}] for t in texts]
        texts = [json.dumps(t, ensure_ascii=False, separators=(",", ":")) for t in turns]
    return pd.DataFrame(
        {
            "id": [f"id{i}" for i in range(rows)],
            "row": [row_number(i) for i in range(rows)],
            "prompt": texts,
            "chat": [chat] * rows,
            "fault": [""] * rows,
            "split": ["eval" if i % 5 == 0 else "train" for i in range(rows)],
        }
    )


def clean_pairs(rows: int = 40, chat: bool = False) -> pd.DataFrame:
    """Distinct pairs; the longer answer is chosen in half of them."""
    long = "There is a lot to say about that, and it is well worth the time: number {}."
    short = "I do not know what to say about that, but it is number {}, is it not?"
    chosen = [(long if i % 2 else short).format(i) for i in range(rows)]
    rejected = [(short if i % 2 else long).format(i) for i in range(rows)]
    return clean_prompts(rows, chat).assign(
        chosen=chosen, rejected=rejected, chosen_ended=True, rejected_ended=True, agreement=1.0
    )


def failed(report: GateReport) -> dict[str, Finding]:
    """Failed findings by rule name without the subject."""
    return {f.rule.split("/")[1]: f for f in report.findings if not f.passed}


class PlainTokens:
    """A `Tokenise` without template from a function text -> ids; a chat is tokenised as its JSON."""

    def __init__(self, encode: Callable[[str], Sequence[int]]) -> None:
        self.encode = encode

    def refusal(self, row: dict[str, Any]) -> None:
        return None

    def prompt(self, text: str, chat: bool, budget: int | None = None, tools: str = "") -> Sequence[int]:
        ids = self.encode(text)
        return ids if budget is None else ids[max(len(ids) - budget, 0) :]

    def completion(self, text: str, ended: bool, *_: object) -> Sequence[int]:
        return [*self.encode(text), *([-1] if ended else [])]
