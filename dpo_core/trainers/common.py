"""Shared by several methods: the model and the log-probs that a job reads, and the export of the policy."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpo_core.data.tokens.tokenise import Tokenise
from dpo_core.errors import StageFailed
from dpo_core.methods.job import Job
from dpo_core.models.dropout import disable_dropout
from dpo_core.models.load import load_model, load_tokenizer
from dpo_core.models.lora import add_lora, merge_lora
from dpo_core.models.save import export_policy
from dpo_core.models.source import check_context
from dpo_core.reference import LogpShard
from dpo_core.training.engine import load_full_state

Export = Callable[[dict[str, Tensor]], None]
"""Writes the result, from the trained weights."""

# How much the log-prob of about 50 tokens may differ between two batch shapes, in nats.
_TOLERANCE = {"fp32": 1e-3, "bf16": 0.5}


def start(job: Job, config: Any) -> tuple[Any, Any, Tokenise]:
    """The model to train, its tokenizer, and the tokenising function."""
    tokenizer = load_tokenizer(Path(job.model))
    model = load_model(Path(job.model))
    check_context(model.config, job.tokens.max_length)
    disable_dropout(model)
    lora = getattr(config, "lora", None)
    if lora:
        add_lora(model, lora, job.seed)
    return model, tokenizer, Tokenise(tokenizer, job.tokens)


def cached_reference(job: Job) -> LogpShard:
    """The reference log-probs that the job names.

    Raises:
        StageFailed: it names none.
    """
    if job.reference_logps is None:
        raise StageFailed(
            f"the {job.method} job file has no reference_logps",
            "Set it to the output folder of a cache-reference job",
        )
    return LogpShard.open(Path(job.reference_logps))


def checked_at_start(examples: Sequence[Any], count: int) -> list[Any]:
    """The examples whose cached log-probs are computed again before the first step."""
    chosen = np.random.default_rng(0).permutation(len(examples))[:count]
    return [examples[i] for i in chosen]


def require_reference_values(gaps_B: Tensor, precision: str) -> None:
    """Check that log π/π_ref (B,) is zero, as it is where the policy is its own reference.

    Raises:
        StageFailed: it is not, so the cached log-probs are not those of this model.
    """
    gap, allowed = float(gaps_B.abs().max()), _TOLERANCE[precision]
    if not gap <= allowed:  # also refuses NaN
        raise StageFailed(
            f"before the first step policy and reference differ by {gap:.3g} nats "
            f"(allowed {allowed}), so the reference log-probs are not those of this model",
            "Remove the folder cache-reference in store/index of the workspace, then resume the run; if the "
            "error repeats, the attention or the precision of policy and reference differs",
        )


def export_model(model: Any, tokenizer: Any, job: Job, config: Any) -> Export:
    """The function that writes a policy, with LoRA weights merged into it."""

    def export(state: dict[str, Tensor]) -> None:
        load_full_state(model, state)
        if getattr(config, "lora", None):
            merge_lora(model)
        export_policy(model, tokenizer, Path(job.model), Path(job.out))

    return export


@torch.no_grad()
def move_towards(reference: Any, policy: Any, share: float) -> None:
    """reference ← share · policy + (1 - share) · reference, in place."""
    for target, source in zip(reference.parameters(), policy.parameters(), strict=True):
        target.lerp_(source.to(target.dtype), share)
