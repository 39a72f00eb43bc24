"""Lengths of the chosen or desirable answers of the data, in tokens, and how many of them end."""

from typing import Any, NamedTuple

import numpy as np
import pandas as pd

_MEASURED = 500  # answers that are tokenised


class Answers(NamedTuple):
    """The chosen, or desirable, answers of the data."""

    tokens: list[int]
    """Lengths of some of them, the end of the turn included."""
    complete: float
    """Share that ends; an answer that was sampled up to a limit does not."""

    @property
    def median(self) -> float:
        """Of their lengths."""
        return float(np.median(self.tokens))


def measure_answers(frame: pd.DataFrame, tokenise: Any) -> Answers | None:
    """The answers of pairs or unpaired rows; None of prompts.

    Args:
        tokenise: a `dpo_core.data.tokens.tokenise.Tokenise`.
    """
    text, ended = ("chosen", "chosen_ended") if "chosen" in frame else ("completion", "ended")
    if text not in frame:
        return None
    rows = frame[frame["label"].astype(bool)] if "label" in frame else frame
    if rows.empty:
        return None
    some = rows if len(rows) <= _MEASURED else rows.sample(_MEASURED, random_state=0)
    tokens = [len(tokenise.completion(t, e)) for t, e in zip(some[text], some[ended], strict=True)]
    return Answers(tokens, float(some[ended].mean()))
