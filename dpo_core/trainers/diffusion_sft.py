"""Trains a diffusion model on captioned images: Ho et al.'s simple loss on what the network predicts.

Noise, noise level and whether the caption is shown follow from the seed, the step and the image's id.

Shapes: B images.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpo_core.data.files.parquet import read_parquet
from dpo_core.methods.diffusion_sft import DiffusionSftConfig
from dpo_core.methods.job import Job
from dpo_core.models.denoiser import Denoiser, load_denoiser, predict, time_steps
from dpo_core.models.denoiser_flops import count_flops
from dpo_core.scoring import flops as cost
from dpo_core.scoring.autocast import autocast
from dpo_core.trainers.common import Export
from dpo_core.trainers.denoising_errors import seeded
from dpo_core.training.batches import Batch
from dpo_core.training.engine import load_full_state
from dpo_core.training.loop import Trainer


@dataclass(frozen=True)
class CaptionedImage:
    """A row: the bytes of a PNG or JPEG file, and its caption."""

    id: str
    prompt: str
    image: bytes


class DiffusionSftTrainer(Trainer[CaptionedImage]):
    """Trainer whose loss is the mean over the images of the global batch of the mean squared error.

    Images are decoded and encoded in each step, so that they need not fit the memory as latents.

    Args:
        module: the network and, if it is trained, the text encoder.
    """

    def __init__(
        self,
        module: nn.Module,
        examples: Sequence[CaptionedImage],
        config: DiffusionSftConfig,
        denoiser: Denoiser,
        *,
        seed: int,
        work: Path,
    ) -> None:
        self.sft, self.denoiser, self.number = config, denoiser, 0
        super().__init__(module, examples, config, seed=seed, work=work)
        self.average = {k: v.detach().clone() for k, v in module.named_parameters()}

    def prepare(self, module: nn.Module) -> None:
        if self.config.engine.gradient_checkpointing:
            self.denoiser.network.enable_gradient_checkpointing()  # type: ignore[operator]
        self.forward_flops = count_flops(lambda: self.losses(self.examples[:1]))

    def length(self, example: CaptionedImage) -> int:
        return 1  # every image has the same size

    def weight(self, example: CaptionedImage) -> float:
        return 1.0

    def sizes(self, batch: Sequence[CaptionedImage]) -> cost.Sizes:
        return cost.Sizes(len(batch), 0, 0)

    def flops(self, batch: Batch) -> float:
        passes = 3 + self.config.engine.gradient_checkpointing
        return len(batch.examples) * passes * self.forward_flops

    def step(self, step: int) -> dict[str, float]:
        self.number = step
        return super().step(step)

    def losses(self, batch: Sequence[CaptionedImage]) -> tuple[Tensor, dict[str, Tensor]]:
        denoiser, noise = self.denoiser, self.denoiser.noise
        device = next(denoiser.network.parameters()).device
        latents_B = denoiser.encode_images([e.image for e in batch]).cpu()
        generators = [seeded(self.seed, self.number, e.id) for e in batch]
        shown_B = [float(torch.rand((), generator=g)) >= self.sft.unconditional for g in generators]
        level_B = torch.stack([torch.randint(noise.steps, (), generator=g) for g in generators])
        noise_B = torch.stack([torch.randn(latents_B.shape[1:], generator=g) for g in generators])
        prompts = [e.prompt if shown else "" for e, shown in zip(batch, shown_B, strict=True)]
        with autocast(self.config.engine.precision, device):
            text_B = denoiser.text_features(prompts)
            noised_B = noise.noised(latents_B, noise_B, level_B).to(device)
            steps_B = time_steps(noise, level_B).to(device)
            predicted_B = predict(denoiser.network, noised_B, steps_B, text_B)
        target_B = noise.target(latents_B, noise_B, level_B).to(device)
        losses_B = (predicted_B.float() - target_B).square().flatten(1).mean(-1)
        return losses_B.sum(), {}

    @torch.no_grad()
    def end_step(self, step: int) -> None:
        # Shorter at first, so that the first weights do not stay in it.
        decay = min(self.sft.averaging, (step + 1) / (step + 10))
        for name, parameter in self.module.named_parameters():
            self.average[name].lerp_(parameter, 1 - decay)

    def state(self) -> dict[str, Any]:
        return {"average": self.average} if self.sft.averaging else {}

    def load_state(self, state: dict[str, Any]) -> None:
        if self.sft.averaging:
            self.average = {k: v.to(self.average[k]) for k, v in state["average"].items()}


def build(job: Job, config: DiffusionSftConfig) -> tuple[Any, Export]:
    denoiser = load_denoiser(Path(job.model)).on_device()
    parts = {"network": denoiser.network}
    if config.text_encoder:
        parts["text_encoder"] = denoiser.text_encoder.requires_grad_(True)
    module = nn.ModuleDict(parts)
    rows = [CaptionedImage(row["id"], row["prompt"], row["image"]) for row in read_parquet(job.data)]
    trainer = DiffusionSftTrainer(module, rows, config, denoiser, seed=job.seed, work=Path(job.work))

    def export(state: dict[str, Tensor]) -> None:
        load_full_state(module, state | trainer.average if config.averaging else state)
        denoiser.save(Path(job.out))

    return trainer, export
