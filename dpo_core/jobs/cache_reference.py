"""Job that computes the reference log-probs of a training's rows, if they are not in the cache."""

from pathlib import Path
from typing import Any

from dpo_core.data.files.parquet import read_parquet
from dpo_core.data.tokens.sequences import no_rows_left
from dpo_core.data.tokens.tokenise import Tokenise
from dpo_core.examples.cached import cached_sequences
from dpo_core.jobs.files import ReferenceJob
from dpo_core.jobs.start import device
from dpo_core.methods.registry import get
from dpo_core.models.load import load_tokenizer
from dpo_core.ranks import JobRanks
from dpo_core.reference.logps import CacheSettings, Reference, reference_logps

FILE = ReferenceJob


def run(job: ReferenceJob, ranks: JobRanks) -> dict[str, Any] | None:
    """Rank 0 writes the shard and returns the counts.

    Raises:
        StageFailed: no training row is left after tokenising.
    """
    method, model = get(job.method), Path(job.model)
    settings = method.settings.model_validate(job.settings)
    tokenise = Tokenise(load_tokenizer(model), job.tokens)
    sequences, dropped = cached_sequences(job.method, settings, tokenise, read_parquet(job.rows))
    if not sequences:
        raise no_rows_left(dropped)
    reference = Reference(model, job.weights_sha256, settings.engine.precision, job.described)
    resources = CacheSettings(Path(job.caches), job.token_budget, device(), job.keep_seconds)
    logps = reference_logps(sequences, reference, resources, ranks)
    if ranks.rank != 0:
        return None
    logps.shard.save(Path(job.out))
    return {
        "attention": logps.attention,
        "sequences": logps.sequences,
        "computed": logps.computed,
        "flops": logps.flops,
        "dropped": dropped,
    }
