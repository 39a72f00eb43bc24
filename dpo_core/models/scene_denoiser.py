"""A small diffusion model with random weights for solid scenes, as a folder of diffusers without a VAE."""

import json
from pathlib import Path
from typing import Any

import torch

from dpo_core.images import solid
from dpo_core.images.scenes import CELL, CELLS
from dpo_core.models.denoiser import INDEX
from dpo_core.models.transformers_lock import quiet_transformers

_LENGTH = 12  # the longest prompt has nine words, and begin and end
_WIDTH = 64


def make_scene_denoiser(folder: Path, channels: tuple[int, ...], seed: int) -> None:
    """Write the folder: a UNet that predicts v on blocks of pixels, a text encoder and a tokenizer.

    Args:
        channels: of the UNet's levels, multiples of 8; each level halves the side.
    """
    with quiet_transformers(), torch.random.fork_rng():
        torch.manual_seed(seed)
        parts = _parts(channels)
        for name, part in parts.items():
            part.save_pretrained(folder / name)
    libraries = {name: type(part).__module__.split(".")[0] for name, part in parts.items()}
    index = {name: [libraries[name], type(part).__name__] for name, part in parts.items()}
    (folder / INDEX).write_text(json.dumps({"_class_name": "StableDiffusionPipeline", **index}, indent=1))


def _parts(channels: tuple[int, ...]) -> dict[str, Any]:
    import diffusers  # noqa: PLC0415 - only where images are made
    from tokenizers import Tokenizer, models, pre_tokenizers, processors  # noqa: PLC0415 - see transformers_lock
    from transformers import (  # noqa: PLC0415 - see transformers_lock
        CLIPTextConfig,
        CLIPTextModel,
        PreTrainedTokenizerFast,
    )

    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    vocabulary = {word: i for i, word in enumerate([*special.values(), *solid.words()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [(word, vocabulary[word]) for word in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    network = diffusers.UNet2DConditionModel(
        sample_size=CELLS,
        in_channels=3 * CELL * CELL,
        out_channels=3 * CELL * CELL,
        down_block_types=("CrossAttnDownBlock2D",) * len(channels),
        mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        cross_attention_dim=_WIDTH,
        attention_head_dim=2,
        norm_num_groups=8,
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
        "unet": network,
        "text_encoder": CLIPTextModel(text),
        "tokenizer": PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=_LENGTH, **special),
        "scheduler": diffusers.DDIMScheduler(
            1000,
            beta_schedule="squaredcos_cap_v2",
            prediction_type="v_prediction",
            clip_sample=True,
            timestep_spacing="trailing",
        ),
    }
