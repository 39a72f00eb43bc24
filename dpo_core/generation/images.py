"""Samples images with a diffusion model; the ranks of a job share the prompts."""

import base64
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dpo_core.generation.config import SamplingConfig, seed_for
from dpo_core.images.codec import as_png
from dpo_core.ranks import Ranks

if TYPE_CHECKING:
    from dpo_core.models.denoiser import Denoiser


def sample_images(
    denoiser: "Denoiser", prompts: Sequence[str], sampling: SamplingConfig, *, seed: int, ranks: Ranks
) -> list[bytes]:
    """A PNG file for each prompt; repeat a prompt for more images.

    The first noise of an image follows from the seed and its place alone, so that models that are asked the
    same begin with the same noise, and their differences are paired.
    """
    size = sampling.batch_size
    units = [(start, list(prompts[start : start + size])) for start in range(0, len(prompts), size)]

    def compute(unit: tuple[int, list[str]]) -> list[str]:
        start, asked = unit
        pixels = denoiser.sample(
            asked,
            steps=sampling.denoising_steps,
            guidance=sampling.guidance,
            seeds=[seed_for(seed, "image", start + place) for place in range(len(asked))],
        )
        return [base64.b64encode(as_png(image)).decode() for image in pixels]

    parts = ranks.map("images", units, compute, [len(asked) for _, asked in units])
    return [base64.b64decode(file) for part in parts for file in part]
