"""The method `diffusion_sft`: training of a diffusion model on captioned images; its settings and data."""

from pydantic import Field, model_validator

from dpo_core.methods.method import GRADIENT, LOSS, Method
from dpo_core.training.config import EngineConfig, LoopConfig, OptimConfig


class DiffusionSftConfig(LoopConfig):
    """Training of a diffusion model on captioned images: the mean squared error of what it predicts."""

    captions: str | None = Field(None, min_length=1)
    """In a recipe: a parquet file with the columns id, prompt and image (the bytes of PNG or JPEG files)."""
    made_scenes: int | None = Field(None, ge=1)
    """In a recipe: number of self-made captioned images of solid scenes, in place of `captions`."""
    wrong: float = Field(0.25, ge=0, le=1)
    """Share of the self-made images that show what another caption says, as on the web."""
    text_encoder: bool = False
    """Train the text encoder as well, as for a model from nothing."""
    unconditional: float = Field(0.1, ge=0, lt=1)
    """Share of images that are shown without their caption, for classifier-free guidance."""
    averaging: float = Field(0.0, ge=0, lt=1)
    """Decay of the moving average of the weights, which is the result; 0: the last weights."""
    optim: OptimConfig = OptimConfig(learning_rate=1e-5)
    """Optimiser and schedule."""
    engine: EngineConfig = EngineConfig()
    """Precision, ZeRO stage, ranks, checkpoints."""

    @model_validator(mode="after")
    def _fits(self) -> "DiffusionSftConfig":
        if self.engine.zero_stage == 3 or self.engine.compile:
            raise ValueError("diffusion trains with zero_stage 0 to 2 and does not compile layers")
        return self


METHOD = Method(
    name="diffusion_sft",
    title="Training of image diffusion models on captioned images",
    citation="Ho et al. 2020, arXiv 2006.11239; Ho and Salimans 2022, arXiv 2207.12598",
    settings=DiffusionSftConfig,
    data="demonstrations",
    curves=(LOSS, GRADIENT),
    model="denoiser",
    policy=False,
)
