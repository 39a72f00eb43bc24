"""Operations of a diffusion model's network, counted without its weights."""

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dpo_core.errors import ModelError
from dpo_core.models.config import DenoiserConfig
from dpo_core.models.denoiser import REMEDY, check_inputs, network_of, predict, require_diffusers
from dpo_core.models.scene_denoiser import make_scene_denoiser
from dpo_core.models.source import first_line
from dpo_core.models.transformers_lock import quiet_transformers


def image_flops(model: Path | DenoiserConfig) -> float:
    """Operations of one forward pass on one image.

    The forward pass runs on tensors without values, so that a large model takes no memory.

    Args:
        model: a folder of diffusers, or the settings of a new model.

    Raises:
        ModelError: diffusers is not installed, or the folder is one that `load_denoiser` refuses.
    """
    if isinstance(model, DenoiserConfig):
        with TemporaryDirectory() as folder:
            make_scene_denoiser(Path(folder), model)
            return image_flops(Path(folder))
    diffusers = require_diffusers()
    part, name = network_of(model)
    try:
        text = json.loads((model / "text_encoder" / "config.json").read_bytes())
        kind = getattr(diffusers, name)
        with quiet_transformers(), FakeTensorMode(allow_non_fake_inputs=True):
            network = kind.from_config(kind.load_config(model / part)).eval()
            check_inputs(network, model)
            return count_flops(lambda: predict(network, *_inputs(network, text)))
    except (OSError, ValueError, AttributeError, RuntimeError, TypeError, KeyError) as error:
        raise ModelError(f"the model in {model} cannot be read: {first_line(error)}", REMEDY) from error


def count_flops(forward: Callable[[], Any]) -> float:
    """Operations of a call, without gradient."""
    # Of the fast kernels of attention on a CPU the counter knows nothing.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        forward()
    return float(counter.get_total_flops())


def _inputs(network: Any, text: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    side = network.config.sample_size
    height, width = (side, side) if isinstance(side, int) else side
    # CLIP's settings and T5's.
    length = text.get("max_position_embeddings") or 120
    features = text.get("hidden_size") or text["d_model"]
    image = torch.zeros(1, network.config.in_channels, height, width)
    return image, torch.zeros(1, dtype=torch.long), torch.zeros(1, length, features)
