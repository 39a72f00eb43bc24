"""Settings of LoRA, and the command that installs its package."""

from typing import Literal

from pydantic import Field

from dpo_core.config import Config

LORA_EXTRA = (
    "pip install 'dpo-pipeline[lora]' (in a checkout: .venv/bin/pip install -c constraints.txt -e '.[lora]')"
)


class LoraConfig(Config):
    """Low-rank adapters (alpha / rank) B A on frozen weights, without dropout."""

    rank: int = Field(16, ge=1)
    """Rank of each adapter."""
    alpha: float = Field(32.0, gt=0)
    """Scale of the adapters, before it is divided by the rank."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Names of linear layers, such as q_proj; `all-linear`: all but the output head."""
