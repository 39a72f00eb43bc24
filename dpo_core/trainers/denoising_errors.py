"""Denoising errors of images at fixed draws of noise, and those of the reference, computed once.

Both images of a pair share the noise and its level, which follow from the seed, the pair's id and the number
of the draw. Shapes: S images (chosen and rejected in turn for pairs), K draws of an example.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dpo_core.images.noise import Noise
from dpo_core.methods.diffusion import DiffusionConfig
from dpo_core.models.denoiser import predict, time_steps
from dpo_core.reference import LogpShard
from dpo_core.scoring.autocast import autocast


@dataclass(frozen=True)
class ImageExample:
    """A pair of images, chosen first, or a single labelled image, with the prompt; all encoded."""

    id: str
    latents_S: tuple[Tensor, ...]
    """(C, H, W) of each image."""
    text: Tensor
    """(L, D)."""
    desirable: bool = True
    """Of a single image."""


def seeded(*parts: object) -> torch.Generator:
    """A generator on the CPU for these parts, the same on every rank and machine."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


@dataclass(frozen=True)
class Draws:
    """The noises and noise levels of every example, from a seed and its id."""

    noise: Noise
    count: int
    seed: int

    def of(self, example: ImageExample, number: int) -> tuple[int, Tensor]:
        """Index of the noise level and the noise (C, H, W) of a draw; both images of a pair share them."""
        generator = seeded(self.seed, example.id, number)
        level = int(torch.randint(self.noise.steps, (), generator=generator))
        return level, torch.randn(example.latents_S[0].shape, generator=generator)

    def errors(self, network: nn.Module, batch: Sequence[ImageExample], number: int) -> Tensor:
        """(S,) squared errors of the noise at a draw, summed over each image."""
        device = next(network.parameters()).device
        drawn = [(len(e.latents_S), *self.of(e, number)) for e in batch]
        level_S = torch.tensor([level for sides, level, _ in drawn for _ in range(sides)])
        noise_S = torch.stack([noise for sides, _, noise in drawn for _ in range(sides)])
        latents_S = torch.stack([latents for e in batch for latents in e.latents_S])
        text_S = torch.stack([e.text for e in batch for _ in e.latents_S])
        noised_S = self.noise.noised(latents_S, noise_S, level_S)
        steps_S = time_steps(self.noise, level_S)
        predicted_S = predict(network, *(x.to(device) for x in (noised_S, steps_S, text_S)))
        target_S = self.noise.target(latents_S, noise_S, level_S)
        return self.noise.squared_errors(predicted_S, target_S.to(device), level_S)

    def key(self, example: ImageExample, side: int) -> bytes:
        """16 bytes that identify an image of an example with its draws."""
        content = hashlib.sha256(f"{self.seed}\0{example.id}\0".encode())
        for tensor in (example.latents_S[side], example.text):
            content.update(tensor.numpy().tobytes())
        return content.digest()[:16]


@torch.no_grad()
def reference_errors(
    network: nn.Module, examples: Sequence[ImageExample], draws: Draws, config: DiffusionConfig
) -> LogpShard:
    """The errors of every image at every draw under a reference. All ranks share the work and get all."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    own: dict[bytes, NDArray[np.float32]] = {}
    size = config.micro_batch_size
    for first in range(rank * size, len(examples), world * size):
        batch = examples[first : first + size]
        with autocast(config.engine.precision, next(network.parameters()).device):
            errors = [draws.errors(network, batch, number) for number in range(draws.count)]
        errors_SK = torch.stack(errors, dim=1).cpu().numpy()
        keys = [draws.key(e, side) for e in batch for side in range(len(e.latents_S))]
        own.update(zip(keys, errors_SK, strict=True))
    parts: list[Any] = [None] * world
    torch.distributed.all_gather_object(parts, own)
    return LogpShard.build({key: errors for part in parts for key, errors in part.items()})
