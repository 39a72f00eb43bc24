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

Keep = Callable[[dict[bytes, NDArray[np.float32]]], None]


class Buffer:
    """Hands entries on from time to time, so that a cache gets few shards and a kill costs little.

    Args:
        add: keeps entries.
        seconds: how much work a kill may cost; 0 hands every pass on.
    """

    def __init__(self, add: Keep, seconds: float = 30.0) -> None:
        self._add, self._seconds = add, seconds
        self._entries: dict[bytes, NDArray[np.float32]] = {}
        self._handed_on = time.monotonic()

    def add(self, entries: dict[bytes, NDArray[np.float32]]) -> None:
        """Take the entries of a pass."""
        self._entries |= entries
        if time.monotonic() - self._handed_on >= self._seconds:
            self.flush()

    def flush(self) -> None:
        """Hand on what is left."""
        if self._entries:
            self._add(self._entries)
        self._entries, self._handed_on = {}, time.monotonic()


def compute(
    model: Any,
    sequences: Seq[Sequence],
    *,
    precision: Precision,
    token_budget: int,
    keep: Keep,
    progress: Callable[[int], None] = lambda more: None,
    only: Callable[[int, list[int]], bool] = lambda number, indices: True,
) -> None:
    """Token log-probs of sequences under a frozen model, handed to `keep` pass by pass.

    Args:
        token_budget: tokens in one forward pass; decides the time, not the values.
        progress: called with the number of sequences of each pass.
        only: whether to compute a pass, given its number and the indices of its sequences.

    Raises:
        StageFailed: a log-prob is not finite.
    """
    for logps in completion_logps(model, sequences, precision, token_budget, only):
        entries: dict[bytes, NDArray[np.float32]] = {}
        for index, logps_L in logps.items():
            values = logps_L.numpy().copy()
            if not np.isfinite(values).all():
                raise StageFailed("a reference log-prob is not finite", "Check the reference model's weights")
            entries[sequence_key(sequences[index])] = values
        keep(entries)
        progress(len(logps))
