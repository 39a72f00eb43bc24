"""Job that compares the tokenizers, chat templates and stop tokens of two checkpoint folders."""

from pathlib import Path
from typing import Any

from dpo_core.data.tokens.stop_tokens import stop_ids
from dpo_core.jobs.files import CompareTokensJob
from dpo_core.models.load import load_tokenizer
from dpo_core.ranks import JobRanks

FILE = CompareTokensJob


def run(job: CompareTokensJob, ranks: JobRanks) -> dict[str, Any]:
    """The names of what differs."""
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
