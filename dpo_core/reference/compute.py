"""Computes reference log-probs of sequences in one process: inference only, batched by length."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_core.data.tokens.sequences import TokenSequence
from dpo_core.errors import StageFailed
from dpo_core.reference.keys import sequence_key
from dpo_core.scoring.completion_scores import completion_logps
from dpo_core.scoring.precision import Precision

Save = Callable[[dict[bytes, NDArray[np.float32]]], None]


class Buffer:
    """Collects entries and saves them at intervals, so that a cache gets few shards and a kill loses little.

    Args:
        save: saves entries.
        seconds: seconds between saves; 0 saves after every pass.
    """

    def __init__(self, save: Save, seconds: float = 30.0) -> None:
        self._save, self._seconds = save, seconds
        self._entries: dict[bytes, NDArray[np.float32]] = {}
        self._saved_at = time.monotonic()

    def add(self, entries: dict[bytes, NDArray[np.float32]]) -> None:
        """Add the entries of a pass."""
        self._entries |= entries
        if time.monotonic() - self._saved_at >= self._seconds:
            self.flush()

    def flush(self) -> None:
        """Save the entries that are not saved yet."""
        if self._entries:
            self._save(self._entries)
        self._entries, self._saved_at = {}, time.monotonic()


def compute(
    model: Any,
    sequences: Sequence[TokenSequence],
    *,
    precision: Precision,
    token_budget: int,
    save: Save,
    only: Callable[[int, list[int]], bool] = lambda number, indices: True,
    name: str = "the reference model",
) -> None:
    """Compute token log-probs of sequences under a frozen model, and pass them to `save` after each pass.

    Args:
        token_budget: tokens in one forward pass; affects the time, not the values.
        only: whether to compute a pass, from its number and the indices of its sequences.
        name: of the model, for errors.

    Raises:
        StageFailed: a log-prob is not finite.
    """
    overflow = "" if precision == "fp32" else f"; if they are, it may overflow in {precision}: use fp32"
    for logps in completion_logps(model, sequences, precision, token_budget, only):
        entries: dict[bytes, NDArray[np.float32]] = {}
        for index, logps_L in logps.items():
            values = logps_L.numpy().copy()
            if not np.isfinite(values).all():
                raise StageFailed(
                    f"{name} gives a log-prob that is not finite for sequence {index} of {len(sequences)} "
                    f"(an answer of {len(values)} tokens)",
                    f"Check that its weights and config are complete and unchanged{overflow}",
                )
            entries[sequence_key(sequences[index])] = values
        save(entries)
