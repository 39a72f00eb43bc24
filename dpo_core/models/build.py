"""Builds a model from a config, with random weights."""

from pathlib import Path
from typing import Any

from dpo_core.models.remote_code import is_trusted
from dpo_core.models.transformers_lock import quiet_transformers


def build(config: Any, **settings: Any) -> Any:
    """A causal language model of a config that was read from a folder, with random weights."""
    with quiet_transformers():
        from transformers import AutoModelForCausalLM  # noqa: PLC0415 - see transformers_lock

        allowed = is_trusted(Path(config.name_or_path)) if config.name_or_path else False
        return AutoModelForCausalLM.from_config(config, trust_remote_code=allowed, **settings)
