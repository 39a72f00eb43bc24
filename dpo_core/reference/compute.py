"""Reference log-probs of many sequences in one process: a plain inference pass, batched by length."""

import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_core.data.tokens.tokenise import Sequence
from dpo_core.errors import StageFailed
from dpo_core.reference.keys import sequence_key
from dpo_core.scoring.logprobs import completion_logps
from dpo_core.scoring.precision import Precision


def compute(
    model: Any,
    sequences: Seq[Sequence],
    *,
    precision: Precision,
    token_budget: int,
    keep: Callable[[dict[bytes, NDArray[np.float32]]], None],
    progress: Callable[[int], None] = lambda more: None,
    keep_seconds: float = 30.0,
    only: Callable[[int, list[int]], bool] = lambda number, indices: True,
) -> None:
    """Token log-probs of sequences under a frozen model, handed to `keep` from time to time and at the end.

    Args:
        token_budget: tokens in one forward pass; decides the time, not the values.
        progress: called with the number of sequences of each pass.
        keep_seconds: how much work a kill may cost; 0 keeps after every batch.
        only: whether to compute a pass, given its number and the indices of its sequences.

    Raises:
        StageFailed: a log-prob is not finite.
    """
    entries: dict[bytes, NDArray[np.float32]] = {}
    kept_at = time.monotonic()
    for logps in completion_logps(model, sequences, precision, token_budget, only):
        for index, logps_L in logps.items():
            values = logps_L.numpy().copy()
            if not np.isfinite(values).all():
                raise StageFailed("a reference log-prob is not finite", "Check the reference model's weights")
            entries[sequence_key(sequences[index])] = values
        if time.monotonic() - kept_at >= keep_seconds:
            keep(entries)
            entries, kept_at = {}, time.monotonic()
        progress(len(logps))
    if entries:
        keep(entries)
