"""Reads reference log-probs from the cache, and computes those that it lacks on all ranks of a job.

Each rank adds its own shards to the cache, so a killed rank loses only what it had not saved.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dpo_core.data.tokens.sequences import TokenSequence
from dpo_core.errors import ModelError, StageFailed
from dpo_core.model_check import check_definition
from dpo_core.models.build import build
from dpo_core.models.dropout import disable_dropout
from dpo_core.models.load import config_in, load_model
from dpo_core.ranks import Ranks, SingleRank
from dpo_core.reference.cache import ReferenceCache, ReferenceFacts
from dpo_core.reference.compute import Buffer, compute
from dpo_core.reference.keys import sequence_key
from dpo_core.reference.shard import LogpShard
from dpo_core.scoring.autocast import effective_precision
from dpo_core.scoring.completion_scores import logprob_flops
from dpo_core.scoring.precision import Precision


@dataclass(frozen=True)
class ReferenceLogps:
    """The log-probs of sequences, and the cost of computing them."""

    shard: LogpShard
    attention: str
    sequences: int
    computed: int
    flops: float
    """Operations of the computed ones, on all ranks."""


@dataclass(frozen=True)
class Reference:
    """The reference and how its log-probs are computed: the key of its cache."""

    model: Path
    """Checkpoint folder."""
    weights_sha256: str
    precision: Precision
    described: str
    """Description for people; not part of the key."""


@dataclass(frozen=True)
class CacheSettings:
    """Cache folder, device and batch size: they affect the time, not the values."""

    caches: Path
    """Folder with one cache for each reference."""
    token_budget: int
    """Tokens in one forward pass."""
    device: torch.device | str = "cpu"
    keep_seconds: float = 30.0
    """Seconds between saves: the work that a rank can lose by a kill."""


def reference_logps(
    sequences: Sequence[TokenSequence],
    reference: Reference,
    resources: CacheSettings,
    ranks: Ranks | None = None,
) -> ReferenceLogps:
    """Log-probs of sequences; only those that the cache lacks are computed.

    Every rank calls this with the same sequences; the values do not depend on the number of ranks.

    Raises:
        StageFailed: a log-prob is not finite.
        ModelError: the model's log-probs cannot be computed from its trunk and head.
    """
    ranks = ranks or SingleRank()
    by_key = {sequence_key(s): s for s in sequences}
    keys = list(by_key)
    attention = attention_of(reference.model)
    precision = effective_precision(reference.precision, resources.device)
    facts = ReferenceFacts(
        weights_sha256=reference.weights_sha256,
        precision=precision,
        attention=attention,
        model=reference.described,
    )
    cache = ReferenceCache(resources.caches / facts.key, facts if ranks.rank == 0 else None)
    # Determined once: ranks that start later, or after a kill, must plan the same passes.
    (absent,) = ranks.map("missing", [len(keys)], lambda _: (~cache.has(keys)).nonzero()[0].tolist())
    missing = [by_key[keys[at]] for at in absent]
    if not cache.has(sorted(set(keys) - {keys[at] for at in absent})).all():
        ranks.discard_results()
        raise StageFailed(
            f"reference log-probs were removed from {cache.folder} while the job that needs them ran",
            "Resume the run, which computes them again, and empty caches only when no run is active",
        )
    flops = _compute(cache, missing, reference, resources, ranks) if missing else 0.0
    cache.reload()
    return ReferenceLogps(cache.select(keys), attention, len(keys), len(missing), flops)


def _compute(
    cache: ReferenceCache,
    missing: Sequence[TokenSequence],
    reference: Reference,
    resources: CacheSettings,
    ranks: Ranks,
) -> float:
    """Compute this rank's passes and wait for those of the others; returns the operations of all."""
    model = load_model(reference.model)
    disable_dropout(model)
    model.to(resources.device)
    check_definition(model)
    keys = [sequence_key(s) for s in missing]
    cache.reload()

    def is_due(number: int, indices: list[int]) -> bool:
        """Whether this rank has to compute a pass."""
        ranks.check()
        if number % ranks.world != ranks.rank:
            return False
        cached = bool(cache.has([keys[i] for i in indices]).all())
        if cached:
            ranks.advance(len(indices))
        return not cached

    buffer = Buffer(cache.add, resources.keep_seconds)

    def save(entries: dict[bytes, NDArray[np.float32]]) -> None:
        buffer.add(entries)
        ranks.advance(len(entries))

    try:
        compute(
            model,
            missing,
            precision=reference.precision,
            token_budget=resources.token_budget,
            save=save,
            only=is_due,
            name=f"the reference model in {reference.model}",
        )
    finally:
        buffer.flush()

    def complete() -> bool:
        cache.reload()
        return bool(cache.has(keys).all())

    ranks.wait_until(complete)
    return logprob_flops(model, missing, resources.token_budget)


def attention_of(model: Path) -> str:
    """The attention implementation that `load_model` will use, without loading weights.

    Raises:
        ModelError: transformers cannot build the model.
    """
    try:
        with torch.device("meta"):
            built = build(config_in(model))
    except Exception as error:
        raise ModelError(
            f"the model in {model} cannot be built: {error}",
            "Remove the folder import-model in store/index of the workspace, then resume the run",
        ) from error
    return str(built.config._attn_implementation)
