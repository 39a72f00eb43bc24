"""Folders of diffusers with random weights: a tiny Stable Diffusion, a UNet on pixels, a flow."""

import io
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

Kind = Literal["epsilon", "v_prediction", "pixels", "flow"]


def make_tiny_diffusion(folder: Path, kind: Kind = "epsilon", seed: int = 0) -> Path:
    """A model of images of 16 x 16 pixels; pixels and flow have no VAE, and flow has a transformer."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(seed)
    characters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = ["<|startoftext|>", "<|endoftext|>", *characters, *(f"{c}</w>" for c in characters)]
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=24)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=24, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        )
    )  # fmt: skip
    channels, side = (4, 8) if kind in ("epsilon", "v_prediction") else (12, 8)
    parts: dict[str, Any] = {"tokenizer": tokenizer, "text_encoder": text}
    if kind == "flow":
        network: Any = diffusers.PixArtTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=channels, out_channels=channels,
            num_layers=1, sample_size=side, patch_size=2, cross_attention_dim=16, caption_channels=16,
            norm_num_groups=4, use_additional_conditions=False,
        )  # fmt: skip
        # A new one ends in zeros: its every output and gradient would be 0.
        torch.nn.init.normal_(network.proj_out.weight, std=0.1)
        parts |= {"transformer": network, "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(1000)}
    else:
        network = diffusers.UNet2DConditionModel(
            sample_size=side, in_channels=channels, out_channels=channels, block_out_channels=(8, 16),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), layers_per_block=1, cross_attention_dim=16,
            attention_head_dim=2, norm_num_groups=4, dropout=0.1,
        )  # fmt: skip
        prediction = "epsilon" if kind == "epsilon" else "v_prediction"
        scheduler = diffusers.DDIMScheduler(
            1000, 0.00085, 0.012, "scaled_linear", prediction_type=prediction, clip_sample=kind == "pixels",
            set_alpha_to_one=False, steps_offset=1,
        )  # fmt: skip
        parts |= {"unet": network, "scheduler": scheduler}
    if channels == 4:
        parts["vae"] = diffusers.AutoencoderKL(
            block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4, sample_size=16,
        )  # fmt: skip
        diffusers.StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        ).save_pretrained(folder)
        return folder
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    libraries = {"tokenizer": "transformers", "text_encoder": "transformers"}
    index = {name: [libraries.get(name, "diffusers"), type(part).__name__] for name, part in parts.items()}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "DiffusionPipeline", **index}))
    return folder


def image_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Pairs of random images as PNG bytes."""
    from PIL import Image

    generator = np.random.default_rng(seed)

    def png() -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(buffer, "PNG")
        return buffer.getvalue()

    words = ["a red cross", "a ring", "two circles"]
    return [
        {"id": f"row-{i}", "prompt": words[i % 3], "chosen": png(), "rejected": png()} for i in range(count)
    ]
