"""Reference log-probs of many sequences in one process: a plain inference pass, batched by length."""

import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_core.errors import StageFailed
from dpo_core.logprobs import Precision, autocast, collate, length_batches, token_logps
from dpo_core.reference.keys import sequence_key
from dpo_core.tokens import Sequence


def compute(
    model: Any,
    sequences: Seq[Sequence],
    *,
    precision: Precision,
    token_budget: int,
    keep: Callable[[dict[bytes, NDArray[np.float32]]], None],
    progress: Callable[[int], None] = lambda done: None,
    keep_seconds: float = 30.0,
) -> None:
    """Token log-probs of sequences under a frozen model, handed to `keep` from time to time and at the end.

    eval mode, no gradients, batched by length.

    Args:
        token_budget: padded tokens in one forward pass; decides the time, not the values.
        keep_seconds: how much work a kill may cost; 0 keeps after every batch.

    Raises:
        StageFailed: a log-prob is not finite.
    """
    import torch

    model.eval()
    device = next(model.parameters()).device
    entries: dict[bytes, NDArray[np.float32]] = {}
    done, kept_at = 0, time.monotonic()
    groups = length_batches([len(s) for s in sequences], token_budget)
    for number, group in enumerate(groups, 1):
        batch = collate([sequences[i] for i in group]).to(device)
        with torch.no_grad(), autocast(precision, device):
            logps_BT = token_logps(model, batch).cpu().numpy()
        if not np.isfinite(logps_BT).all():
            raise StageFailed("a reference log-prob is not finite", "Check the reference model's weights")
        for row, index in enumerate(group):
            sequence = sequences[index]
            entries[sequence_key(sequence)] = logps_BT[row, len(sequence.prompt) : len(sequence)].copy()
        done += len(group)
        if time.monotonic() - kept_at >= keep_seconds or number == len(groups):
            keep(entries)
            entries, kept_at = {}, time.monotonic()
        progress(done)
