"""Measures the data's chosen or desirable answers: lengths in tokens, and the share that is complete."""

from typing import Any, NamedTuple

import numpy as np
import pandas as pd

_MEASURED = 500  # answers that are tokenised


class AnswerStatistics(NamedTuple):
    """Statistics of the data's chosen or desirable answers."""

    tokens: list[int]
    """Lengths of a sample of them, including the end of the turn."""
    complete: float
    """Share of complete answers; an answer that was cut at a length limit is not complete."""

    @property
    def median(self) -> float:
        """Median length in tokens."""
        return float(np.median(self.tokens))


def measure_answers(frame: pd.DataFrame, tokenise: Any) -> AnswerStatistics | None:
    """Statistics of the answers of pairs or unpaired rows; None for prompts.

    Args:
        tokenise: a `dpo_core.data.tokens.tokenise.Tokenise`.
    """
    text, ended = ("chosen", "chosen_ended") if "chosen" in frame else ("completion", "ended")
    if text not in frame:
        return None
    rows = frame[frame["label"].astype(bool)] if "label" in frame else frame
    if rows.empty:
        return None
    sample = rows if len(rows) <= _MEASURED else rows.sample(_MEASURED, random_state=0)
    tokens = [len(tokenise.completion(t, e)) for t, e in zip(sample[text], sample[ended], strict=True)]
    return AnswerStatistics(tokens, float(sample[ended].mean()))
