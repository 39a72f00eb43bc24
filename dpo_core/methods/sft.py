"""Supervised fine-tuning: its settings, data and trainer."""

from pydantic import Field, model_validator

from dpo_core.methods.method import GRADIENT, LOSS, Method
from dpo_core.models.lora_config import LoraConfig
from dpo_core.training.config import EngineConfig, OptimConfig, PackedLoopConfig


class SftConfig(PackedLoopConfig):
    """Supervised fine-tuning, which makes the reference."""

    enabled: bool = True
    """False: the base model is the reference."""
    demonstrations: str | None = Field(None, min_length=1)
    """File of demonstrations, rows of {prompt, completion}. Empty: the chosen or desirable answers."""
    made_demonstrations: int | None = Field(None, ge=1)
    """Number of self-made review demonstrations, for the self-made openings."""
    made_scenes: int | None = Field(None, ge=1, exclude_if=lambda count: count is None)
    """Number of self-made captioned scenes, for images; as on the web, a third of the captions are wrong."""
    batch_size: int = Field(16, ge=1)
    """Demonstrations in one optimiser step, over all ranks."""
    optim: OptimConfig = OptimConfig(learning_rate=2e-5)
    """Optimiser and schedule."""
    engine: EngineConfig = EngineConfig()
    """Precision, ZeRO stage, ranks, checkpoints."""
    lora: LoraConfig | None = None
    """Train only LoRA weights, which are merged into the result; empty: train all weights."""

    @model_validator(mode="after")
    def _one_source(self) -> "SftConfig":
        named = ("demonstrations", "made_demonstrations", "made_scenes")
        if len(given := [name for name in named if getattr(self, name) is not None]) > 1:
            raise ValueError(f"{given[0]} and {given[1]} are both set: choose one")
        return self

    @property
    def reads_answers(self) -> bool:
        """Whether it learns from the answers of the data."""
        return self.demonstrations is None and self.made_demonstrations is None and self.made_scenes is None


METHOD = Method(
    name="sft",
    title="Supervised fine-tuning",
    citation="Ouyang et al. 2022, arXiv 2203.02155, section 3.5",
    settings=SftConfig,
    data="demonstrations",
    curves=(LOSS, GRADIENT),
    version=2,
    policy=False,
)
