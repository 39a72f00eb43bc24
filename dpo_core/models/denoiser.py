"""Image diffusion models as folders of diffusers: reading, encoding prompts and images, sampling, writing.

The network is a UNet or a diffusion transformer; VAE and text encoder are frozen. A folder without a VAE is
one of a model on pixels: blocks of pixels are folded into its channels, without loss.

Shapes: B images or prompts, C channels, H and W of the latents, L tokens of a prompt, D features of a token.
"""

import inspect
import io
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dpo_core.errors import DataError, ModelError
from dpo_core.images.noise import Noise
from dpo_core.models.dropout import disable_dropout
from dpo_core.models.folder import DIFFUSION_INDEX, IMAGES_EXTRA, require_safetensors
from dpo_core.models.save import most_frequent_dtype
from dpo_core.models.source import first_line
from dpo_core.models.transformers_lock import quiet_transformers

INDEX = DIFFUSION_INDEX
_FURTHER_INPUTS = ("addition_embed_type", "class_embed_type", "num_class_embeds", "use_additional_conditions")
_NETWORKS = ("unet", "transformer")
REMEDY = "Use a folder of diffusers with one text encoder, such as one of Stable Diffusion 1.5 or PixArt"

Pixels = NDArray[np.uint8]


@dataclass
class Denoiser:
    """The parts of a diffusion model, in fp32 and eval mode."""

    folder: Path
    part: str
    """The subfolder of the network."""
    network: nn.Module
    noise: Noise
    scheduler: Any
    """As the folder names it; `sample` uses DDIM, or Euler for flows."""
    tokenizer: Any
    text_encoder: nn.Module
    vae: Any | None

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image that the network denoises."""
        config: Any = self.network.config
        side = config.sample_size
        height, width = (side, side) if isinstance(side, int) else side
        return config.in_channels, height, width

    @property
    def cell(self) -> int:
        """Pixels of an image's side for each of the latents' side."""
        if self.vae is None:
            return math.isqrt(self.latent_shape[0] // 3)
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def pixels(self) -> tuple[int, int]:
        """Height and width of its images."""
        _, height, width = self.latent_shape
        return height * self.cell, width * self.cell

    def on_device(self) -> "Denoiser":
        """The same, with its parts moved to the GPU if there is one."""
        if torch.cuda.is_available():
            for part in (self.network, self.text_encoder, self.vae):
                if part is not None:
                    part.to(torch.device("cuda", torch.cuda.current_device()))
        return self

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """(B, L, D) features of prompts, padded and cut to the text encoder's length."""
        return self.text_features(prompts)

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """`encode_prompts` with gradient."""
        device = next(self.text_encoder.parameters()).device
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=self._length, return_tensors="pt"
        )
        return self.text_encoder(tokens.input_ids.to(device))[0].float()

    @property
    def _length(self) -> int:
        limit = getattr(self.text_encoder.config, "max_position_embeddings", None)
        # Tokenizers without a limit have a very large number here.
        return min(limit or 120, self.tokenizer.model_max_length)

    @torch.no_grad()
    def encode_images(self, images: Sequence[bytes]) -> Tensor:
        """(B, C, H, W) latents of PNG or JPEG files, which are scaled and cut to the model's square.

        Raises:
            DataError: an image cannot be read.
        """
        height, width = self.pixels
        size = (width, height)
        pixels = np.stack([_read(image, size) for image in images])
        values = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
        if self.vae is None:
            return nn.functional.pixel_unshuffle(values, self.cell)
        values = values.to(self.vae.device)
        # The mode and not a sample: the same image has the same latents in each run.
        latents = self.vae.encode(values).latent_dist.mode()
        return (latents - _shift(self.vae)) * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Pixels:
        """(B, height, width, 3) of latents."""
        if self.vae is None:
            values = nn.functional.pixel_shuffle(latents, self.cell)
        else:
            values = self.vae.decode(latents / self.vae.config.scaling_factor + _shift(self.vae)).sample
        pixels = ((values.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return pixels.permute(0, 2, 3, 1).cpu().numpy()

    @torch.no_grad()
    def sample(self, prompts: Sequence[str], *, steps: int, guidance: float, seeds: Sequence[int]) -> Pixels:
        """(B, height, width, 3), an image of each prompt.

        DDIM (Song et al. 2020, arXiv 2010.02502), or Euler steps of a flow, with classifier-free guidance (Ho
        and Salimans 2022, arXiv 2207.12598): 1 is the conditional model.

        Args:
            seeds: of the first noise of each image, which does not depend on the other images of the call.
        """
        device = next(self.network.parameters()).device
        noise_B = [torch.randn(self.latent_shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
        latents = torch.stack(noise_B).to(device)
        text = self.encode_prompts(prompts).to(device)
        if guidance != 1:
            text = torch.cat([self.encode_prompts([""]).to(device).expand_as(text), text])
        scheduler = _sampler(self.scheduler)
        scheduler.set_timesteps(steps, device=device)
        for t in scheduler.timesteps:
            noised = latents if guidance == 1 else torch.cat([latents, latents])
            predicted = predict(self.network, noised, t.expand(len(noised)), text)
            if guidance != 1:
                without, given = predicted.chunk(2)
                predicted = without + guidance * (given - without)
            latents = scheduler.step(predicted, t, latents).prev_sample
        return self.decode(latents)

    def save(self, out: Path) -> None:
        """Write the folder with the weights of network and text encoder in their former data types."""
        trained: dict[str, Any] = {self.part: self.network, "text_encoder": self.text_encoder}
        shutil.copytree(self.folder, out, ignore=shutil.ignore_patterns(*trained), dirs_exist_ok=True)
        for name, part in trained.items():
            dtype = most_frequent_dtype(self.folder / name)
            with quiet_transformers():
                (part.to(dtype) if dtype else part).save_pretrained(out / name)
            # With every setting of the start, dropout too, and without the folder that it was read from.
            shutil.copyfile(self.folder / name / "config.json", out / name / "config.json")


def load_denoiser(folder: Path) -> Denoiser:
    """Read a folder of diffusers: network, scheduler, tokenizer, text encoder and, if there is one, VAE.

    Raises:
        ModelError: diffusers is not installed; or the folder is damaged, has pickled weights, or needs more
            than one text encoder or other inputs.
    """
    diffusers = require_diffusers()
    parts = _parts(folder)
    part, _ = network_of(folder)
    try:
        with quiet_transformers():
            import transformers  # noqa: PLC0415 - see transformers_lock

            loaded = {
                name: _load(diffusers if library == "diffusers" else transformers, kind, folder / name)
                for name, (library, kind) in parts.items()
                if name in (part, "scheduler", "tokenizer", "text_encoder", "vae")
            }
    except (OSError, ValueError, AttributeError, RuntimeError) as error:
        raise ModelError(f"the model in {folder} cannot be loaded: {first_line(error)}", REMEDY) from error
    network = loaded[part]
    check_inputs(network, folder)
    for name in (part, "text_encoder", "vae"):
        if name in loaded:
            disable_dropout(loaded[name].eval().requires_grad_(name == part))
    return Denoiser(
        folder,
        part,
        network,
        noise_of(loaded["scheduler"]),
        loaded["scheduler"],
        loaded["tokenizer"],
        loaded["text_encoder"],
        loaded.get("vae"),
    )


def network_of(folder: Path) -> tuple[str, str]:
    """The subfolder of the network, and its class in diffusers.

    Raises:
        ModelError: the folder lacks a part that every model has, or has a second text encoder.
    """
    parts = _parts(folder)
    part = next((name for name in _NETWORKS if name in parts), None)
    if part is None or not {"scheduler", "tokenizer", "text_encoder"} <= parts.keys():
        raise ModelError(f"{folder} has no network, scheduler, tokenizer or text encoder", REMEDY)
    if "text_encoder_2" in parts:
        raise ModelError(f"{folder} has more than one text encoder", REMEDY)
    return part, parts[part][1]


def require_diffusers() -> Any:
    """The package.

    Raises:
        ModelError: it is not installed.
    """
    try:
        import diffusers  # noqa: PLC0415 - only where images are made
    except ImportError as error:
        missing = "diffusion needs the package diffusers, which is not installed"
        raise ModelError(missing, IMAGES_EXTRA) from error
    return diffusers


def predict(network: nn.Module, noised: Tensor, t_B: Tensor, text: Tensor) -> Tensor:
    """What the network predicts, (B, C, H, W); `t_B` are the scheduler's time steps."""
    if "sample" in inspect.signature(network.forward).parameters:
        return network(noised, t_B, encoder_hidden_states=text).sample
    sizes = {"resolution": None, "aspect_ratio": None}
    more = {"added_cond_kwargs": sizes} if _takes(network, "added_cond_kwargs") else {}
    predicted = network(noised, encoder_hidden_states=text, timestep=t_B, **more).sample
    # Some transformers also predict a variance, in further channels.
    return predicted[:, : noised.shape[1]]


def noise_of(scheduler: Any) -> Noise:
    """The noise levels of a scheduler of diffusers, and what its network predicts.

    Raises:
        ModelError: a kind of scheduler that is not known here.
    """
    config = scheduler.config
    if "Flow" in type(scheduler).__name__ or config.get("prediction_type") == "flow_prediction":
        return Noise.flow(config.num_train_timesteps)
    prediction = config.get("prediction_type", "epsilon")
    if not hasattr(scheduler, "alphas_cumprod") or prediction not in ("epsilon", "v_prediction", "sample"):
        raise ModelError(
            f"the scheduler {type(scheduler).__name__} with prediction_type {prediction} is not supported",
            "Use one of DDPM's family, or a flow",
        )
    return Noise.from_alphas(scheduler.alphas_cumprod, prediction)


def time_steps(noise: Noise, t_B: Tensor) -> Tensor:
    """The time steps that a network gets for indices into `noise`: a flow counts them from 1."""
    return t_B + 1 if noise.prediction == "flow" else t_B


def _sampler(scheduler: Any) -> Any:
    import diffusers  # noqa: PLC0415 - only where images are made

    flow = noise_of(scheduler).prediction == "flow"
    kind = diffusers.FlowMatchEulerDiscreteScheduler if flow else diffusers.DDIMScheduler
    return kind.from_config(scheduler.config)


def _parts(folder: Path) -> dict[str, tuple[str, str]]:
    """Library and class of each part that the index names."""
    try:
        index = json.loads((folder / INDEX).read_bytes())
        named = {k: tuple(v) for k, v in index.items() if not k.startswith("_") and isinstance(v, list)}
        return {k: (str(v[0]), str(v[1])) for k, v in named.items() if v[0] in ("diffusers", "transformers")}
    except (OSError, ValueError, AttributeError, IndexError) as error:
        raise ModelError(f"{folder / INDEX} cannot be read ({first_line(error)})", REMEDY) from error


def _load(library: Any, kind: str, folder: Path) -> Any:
    part = getattr(library, kind)
    if not issubclass(part, nn.Module):
        return part.from_pretrained(folder, local_files_only=True)
    require_safetensors(folder)
    dtype = {"torch_dtype" if library.__name__ == "diffusers" else "dtype": torch.float32}
    model, info = part.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, output_loading_info=True, **dtype
    )
    if info["missing_keys"]:
        raise ValueError(f"{folder.name} lacks weights, first {sorted(info['missing_keys'])[0]}")
    return model


def check_inputs(network: Any, folder: Path) -> None:
    """Refuse a network that reads more than images, levels and a prompt.

    Raises:
        ModelError: it does.
    """
    other = [name for name in _FURTHER_INPUTS if network.config.get(name)]
    names = inspect.signature(network.forward).parameters
    known = {"encoder_hidden_states", "timestep"} <= names.keys() and "pooled_projections" not in names
    if other or not known:
        what = f"reads {other[0]}" if other else "reads other inputs"
        raise ModelError(f"{type(network).__name__} of {folder} {what}", REMEDY)


def _takes(network: nn.Module, name: str) -> bool:
    return name in inspect.signature(network.forward).parameters


def _shift(vae: Any) -> float:
    return getattr(vae.config, "shift_factor", None) or 0.0


def _read(image: bytes, size: tuple[int, int]) -> Pixels:
    from PIL import Image, ImageOps  # noqa: PLC0415 - only where images are read

    try:
        with Image.open(io.BytesIO(image)) as opened:
            pixels = opened.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"an image cannot be read ({first_line(error)})", "Remove its row") from error
    return np.asarray(pixels if pixels.size == size else ImageOps.fit(pixels, size, Image.Resampling.LANCZOS))
