"""Job that compares the tokenizers, chat templates and stop tokens of two checkpoint folders."""

from pathlib import Path
from typing import Any

from dpo_core.data.tokens.stop_tokens import stop_ids
from dpo_core.jobs.files import CompareTokensJob
from dpo_core.jobs.start import start_ranks
from dpo_core.models.load import load_tokenizer
from dpo_core.training.liveness import LivenessMonitor

FILE = CompareTokensJob


def run(job: CompareTokensJob, monitor: LivenessMonitor) -> dict[str, Any] | None:
    """Rank 0 returns the names of what differs."""
    if start_ranks(Path(job.work), job.ranks, monitor).rank != 0:
        return None
    own, other = load_tokenizer(Path(job.model)), load_tokenizer(Path(job.other))
    differing = [
        what
        for what, a, b in (
            ("tokenizer", own.get_vocab(), other.get_vocab()),
            ("chat template", own.chat_template, other.chat_template),
            ("end of an answer", stop_ids(own), stop_ids(other)),
        )
        if a != b
    ]
    return {"differing": differing}
