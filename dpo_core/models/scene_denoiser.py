"""A small diffusion model with random weights for solid scenes, as a folder of diffusers without a VAE."""

import json
import math
from pathlib import Path
from typing import Any

import torch

from dpo_core.images import solid
from dpo_core.images.scenes import CELL, CELLS
from dpo_core.models.config import DenoiserConfig
from dpo_core.models.denoiser import INDEX, require_diffusers
from dpo_core.models.transformers_lock import quiet_transformers

_LENGTH = 12  # the longest prompt has nine words, and begin and end
_WIDTH = 64
_PATCH = 2
"""Blocks of pixels on a side of a token: an object begins at a token's corner."""
_STEPS = 1000
_FIRST_LEVEL, _LAST_LEVEL = 0.5, 0.9995
"""Shares of noise."""


def make_scene_denoiser(folder: Path, config: DenoiserConfig) -> None:
    """Write the folder: a transformer that predicts the image, a text encoder and a tokenizer.

    Args:
        config: the transformer's sizes, and the seed of all weights.
    """
    with quiet_transformers(), torch.random.fork_rng():
        torch.manual_seed(config.seed)
        parts = _parts(config)
        for name, part in parts.items():
            part.save_pretrained(folder / name)
    libraries = {name: type(part).__module__.split(".")[0] for name, part in parts.items()}
    index = {name: [libraries[name], type(part).__name__] for name, part in parts.items()}
    (folder / INDEX).write_text(json.dumps({"_class_name": "DiffusionPipeline", **index}, indent=1))


def _parts(config: DenoiserConfig) -> dict[str, Any]:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors  # noqa: PLC0415 - see transformers_lock
    from transformers import (  # noqa: PLC0415 - see transformers_lock
        CLIPTextConfig,
        CLIPTextModel,
        PreTrainedTokenizerFast,
    )

    diffusers = require_diffusers()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    vocabulary = {word: i for i, word in enumerate([*special.values(), *solid.words()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [(word, vocabulary[word]) for word in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    network = diffusers.PixArtTransformer2DModel(
        num_attention_heads=config.heads,
        attention_head_dim=config.width // config.heads,
        in_channels=3 * CELL * CELL,
        out_channels=3 * CELL * CELL,
        num_layers=config.layers,
        cross_attention_dim=config.width,
        sample_size=CELLS,
        patch_size=_PATCH,
        caption_channels=_WIDTH,
        use_additional_conditions=False,
    )
    text = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=_WIDTH,
        intermediate_size=2 * _WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=_LENGTH,
        pad_token_id=vocabulary["<pad>"],
        bos_token_id=vocabulary["<s>"],
        eos_token_id=vocabulary["</s>"],
    )
    return {
        "transformer": network,
        "text_encoder": CLIPTextModel(text),
        "tokenizer": PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=_LENGTH, **special),
        "scheduler": diffusers.DDIMScheduler(
            _STEPS,
            trained_betas=_betas(),
            prediction_type="sample",
            clip_sample=True,
            timestep_spacing="trailing",
        ),
    }


def _betas() -> list[float]:
    """Of noise levels at equal angles: level = sin, and image = cos.

    The first level is not near 0. Below it an image can be told from its noise, so that there is nothing to
    learn, and the smallest error of a policy would count as a large one beside the reference's.
    """
    angles = torch.linspace(math.asin(_FIRST_LEVEL), math.asin(_LAST_LEVEL), _STEPS, dtype=torch.float64)
    alphas = angles.cos() ** 2
    before = torch.cat([torch.ones_like(alphas[:1]), alphas[:-1]])
    return (1 - alphas / before).tolist()
