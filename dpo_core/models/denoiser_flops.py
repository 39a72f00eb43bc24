"""Operations of a diffusion model's network, counted without its weights."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from dpo_core.errors import ModelError
from dpo_core.models.config import DenoiserConfig
from dpo_core.models.denoiser import REMEDY, network_of, predict
from dpo_core.models.scene_denoiser import make_scene_denoiser
from dpo_core.models.source import first_line
from dpo_core.models.transformers_lock import quiet_transformers


def image_flops(model: Path | DenoiserConfig) -> float:
    """Operations of one forward pass on one image.

    The forward pass runs on tensors without values, so that a large model takes no memory.

    Args:
        model: a folder of diffusers, or the settings of a new model.

    Raises:
        ModelError: the folder cannot be read.
    """
    if isinstance(model, DenoiserConfig):
        with TemporaryDirectory() as folder:
            make_scene_denoiser(Path(folder), model)
            return image_flops(Path(folder))
    part, name = network_of(model)
    import diffusers  # noqa: PLC0415 - only where images are made

    try:
        kind = getattr(diffusers, name)
        text = json.loads((model / "text_encoder" / "config.json").read_bytes())
        with quiet_transformers(), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            network = kind.from_config(kind.load_config(model / part)).eval()
            with FlopCounterMode(display=False) as counter:
                predict(network, *_inputs(network, text))
    except (OSError, ValueError, AttributeError, RuntimeError) as error:
        raise ModelError(f"the model in {model} cannot be read: {first_line(error)}", REMEDY) from error
    return float(counter.get_total_flops())


def _inputs(network: Any, text: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    side = network.config.sample_size
    height, width = (side, side) if isinstance(side, int) else side
    # CLIP's settings and T5's.
    length = text.get("max_position_embeddings") or 120
    features = text.get("hidden_size") or text["d_model"]
    image = torch.zeros(1, network.config.in_channels, height, width)
    return image, torch.zeros(1, dtype=torch.long), torch.zeros(1, length, features)
