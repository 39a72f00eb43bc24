"""What a recipe says about LoRA, and how its package is installed."""

from typing import Literal

from pydantic import Field

from dpo_core.config import Config

LORA_EXTRA = (
    "pip install 'dpo-pipeline[lora]' (in a checkout: .venv/bin/pip install -c constraints.txt -e '.[lora]')"
)


class LoraConfig(Config):
    """Which weights get an addition (alpha / rank) B A, and of what rank. There is no dropout."""

    rank: int = Field(16, ge=1)
    """Rank of each addition."""
    alpha: float = Field(32.0, gt=0)
    """Scale of the additions, before it is divided by the rank."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Names of linear layers, such as q_proj; all but the output head when not given."""
