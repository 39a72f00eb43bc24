"""Reference log-probs, one entry per (prompt, completion), addressed by content: keys and computation.

Key of an entry: the exact ids of prompt and completion. Key of a cache folder: the reference's weight files,
the precision, the attention implementation and the definition version. The run's configuration is in neither,
so a changed learning rate recomputes nothing, and a changed weight, template or token what it touches.
"""

import hashlib
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_core.errors import StageFailed
from dpo_core.logp_shard import LogpShard
from dpo_core.logprobs import DEFINITION_VERSION, Precision, autocast, collate, length_batches, token_logps
from dpo_core.reference_cache import ReferenceCache, ReferenceFacts
from dpo_core.tokens import Sequence

__all__ = [
    "LogpShard",
    "ReferenceCache",
    "compute",
    "reference_facts",
    "reference_key",
    "sequence_key",
    "share",
]


def sequence_key(sequence: Sequence) -> bytes:
    """16 bytes that name one (prompt, completion) by its ids; where the prompt ends is part of it."""
    digest = hashlib.sha256(len(sequence.prompt).to_bytes(8, "little"))
    digest.update(np.asarray(sequence.prompt + sequence.completion, dtype=np.int64).tobytes())
    return digest.digest()[:16]


def reference_facts(
    weights_sha256: str, precision: Precision, attention: str, model: str = ""
) -> ReferenceFacts:
    """Everything but the text that decides a reference log-prob, and the model in words."""
    return ReferenceFacts(
        weights_sha256=weights_sha256,
        precision=precision,
        attention=attention,
        definition_version=DEFINITION_VERSION,
        model=model,
    )


def reference_key(weights_sha256: str, precision: Precision, attention: str) -> str:
    """The name of a reference's cache folder."""
    return reference_facts(weights_sha256, precision, attention).key


def share(sequences: Seq[Sequence], rank: int, world: int) -> list[Sequence]:
    """The sequences that fall to one of `world` processes.

    Decided by each sequence's own key, so that processes that see different parts of the work already done
    still leave nothing out and do nothing twice.
    """
    return [s for s in sequences if int.from_bytes(sequence_key(s)[:8], "little") % world == rank]


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
