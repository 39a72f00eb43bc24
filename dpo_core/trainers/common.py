"""Loads the model that a job trains, and exports the trained policy; shared by several methods."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from dpo_core.data.tokens.tokenise import Tokenise
from dpo_core.methods.job import Job
from dpo_core.models.dropout import disable_dropout
from dpo_core.models.load import load_model, load_tokenizer
from dpo_core.models.lora import add_lora, merge_lora
from dpo_core.models.save import export_policy
from dpo_core.models.source import check_context
from dpo_core.training.engine import load_full_state

Export = Callable[[dict[str, Tensor]], None]
"""Writes the result, from the trained weights."""


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


def export_model(model: Any, tokenizer: Any, job: Job, *, lora: bool) -> Export:
    """The function that writes a policy, with LoRA weights merged into it."""

    def export(state: dict[str, Tensor]) -> None:
        load_full_state(model, state)
        if lora:
            merge_lora(model)
        export_policy(model, tokenizer, Path(job.model), Path(job.out))

    return export
