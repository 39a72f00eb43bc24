"""Trains a diffusion model with the objectives of the registry, on denoising errors instead of log-probs.

Both images of a pair share the noise and its level, which are drawn from the seed and the pair's id: the
reference's errors are computed once for every draw, so that a step runs the policy alone.

Shapes: B examples, S images (chosen and rejected in turn for pairs), K draws of an example.
"""

import copy
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dpo_core.data.files.parquet import read_parquet
from dpo_core.errors import RecipeError, StageFailed
from dpo_core.images.files import read_bytes
from dpo_core.methods.diffusion import DISPLACED_ERROR, DiffusionConfig
from dpo_core.methods.job import Job
from dpo_core.models.denoiser import Denoiser, load_denoiser
from dpo_core.models.denoiser_flops import count_flops
from dpo_core.models.lora import add_lora, merge_lora
from dpo_core.models.source import weights_digest
from dpo_core.objectives import (
    PairLogps,
    UnpairedLogps,
    class_means,
    combine,
    pair_metrics,
    unpaired_metrics,
    z0,
)
from dpo_core.reference import LogpShard
from dpo_core.scoring import flops as cost
from dpo_core.scoring.autocast import autocast
from dpo_core.trainers.common import Export, checked_at_start
from dpo_core.trainers.denoising_errors import Draws, ImageExample, reference_errors
from dpo_core.training.batches import Batch
from dpo_core.training.engine import load_full_state, read_metrics
from dpo_core.training.loop import Trainer

log = logging.getLogger(__name__)

_ENCODED_AT_ONCE = 16


class DiffusionTrainer(Trainer[ImageExample]):
    """Trainer whose loss is the mean of an objective over the examples of the global batch.

    Args:
        reference: errors of every image under the reference, or the reference itself, which is frozen.
        policy_is_reference: the policy starts as the reference, so the first loss has a known value.

    Raises:
        RecipeError: the objective needs the whole batch in one forward pass, and the batch is split.
        StageFailed: the reference's errors lack an image.
    """

    def __init__(
        self,
        module: nn.Module,
        examples: Sequence[ImageExample],
        config: DiffusionConfig,
        *,
        draws: Draws,
        reference: LogpShard | nn.Module,
        policy_is_reference: bool,
        work: Path,
    ) -> None:
        self.dpo, self.draws, self.number = config, draws, 0
        super().__init__(module, examples, config, seed=draws.seed, work=work)
        self.term, self.policy_is_reference = config.term, policy_is_reference
        scale = config.objective_entry.reward_scale
        self.scale = self.term.parameters[scale] if scale else 1.0
        self.live = reference if isinstance(reference, nn.Module) else None
        if self.live is not None:
            self.live.to(self.engine.device).eval().requires_grad_(False)
        elif isinstance(reference, LogpShard):
            self.errors_SK = self._cached(reference)
        parts = self.batches.micro_batches * self.engine.world
        if config.objective_entry.batch_coupled and parts != 1:
            raise RecipeError(
                f"objective '{config.objective}' needs a batch in one forward pass, but it is split into "
                f"{parts}",
                "Train in one process, and raise micro_batch_size to batch_size",
            )
        self.kl: Tensor | None = None
        self.baseline: Tensor | None = None
        self.rewards, self.seen = 0.0, 0

    def _cached(self, shard: LogpShard) -> dict[str, Tensor]:
        """(S, K) errors of each example by its id."""
        keys = [[self.draws.key(e, side) for side in range(len(e.latents_S))] for e in self.examples]
        rows = shard.positions([key for group in keys for key in group])
        if (rows < 0).any():
            raise StageFailed(
                f"{int((rows < 0).sum())} of {len(rows)} images have no error of the reference",
                "Remove the folder reference-errors from the job's work folder, then run the job again",
            )
        errors = [shard.tokens(int(row))[: self.draws.count] for row in rows]
        if min(map(len, errors)) < self.draws.count:
            raise StageFailed(
                f"the reference's errors are of {min(map(len, errors))} draws, and the job uses "
                f"{self.draws.count}",
                "Remove the folder reference-errors from the job's work folder, then run the job again",
            )
        values = iter(torch.from_numpy(np.stack(errors)))
        return {
            e.id: torch.stack([next(values) for _ in group])
            for e, group in zip(self.examples, keys, strict=True)
        }

    def prepare(self, module: nn.Module) -> None:
        if self.config.engine.gradient_checkpointing:
            module.enable_gradient_checkpointing()  # type: ignore[operator]
        flops = count_flops(lambda: self.draws.errors(module, self.examples[:1], 0))
        self.forward_flops = flops / len(self.examples[0].latents_S)

    def length(self, example: ImageExample) -> int:
        return 1  # every image has the same size

    def tokens(self, example: ImageExample) -> int:
        return len(example.latents_S)

    def weight(self, example: ImageExample) -> float:
        return 1.0

    def sizes(self, batch: Sequence[ImageExample]) -> cost.Sizes:
        images = sum(len(e.latents_S) for e in batch)
        return cost.Sizes(images, 0, 0)

    def flops(self, batch: Batch) -> float:
        """Operations of a step: a backward pass counts as two forward passes."""
        images = self.sizes([self.examples[i] for i in batch.examples]).tokens
        passes = 3 + (self.live is not None) + (not self.dpo.on_pairs)
        passes += self.config.engine.gradient_checkpointing
        return images * passes * self.forward_flops

    def step(self, step: int) -> dict[str, float]:
        # An epoch uses one draw. It depends on the step alone, so that a resumed run draws the same.
        self.number = step * self.dpo.batch_size // len(self.examples) % self.draws.count
        return super().step(step)

    def begin_step(self, batch: Sequence[ImageExample]) -> None:
        if self.dpo.on_pairs:
            return
        # Over all ranks, as in Diffusion-KTO, so that the loss does not depend on the split of the batch.
        own = batch[self.engine.rank :: self.engine.world]
        total = torch.zeros((), dtype=torch.float64)
        with torch.no_grad():
            for first in range(0, len(own), self.dpo.micro_batch_size):
                policy_B, ref_B = self.surrogates(own[first : first + self.dpo.micro_batch_size])
                total += (policy_B - ref_B).sum().cpu()
        total = self.engine.all_sum(total)
        self.kl = z0(total, len(batch))
        self.rewards += self.scale * float(total)
        self.seen += len(batch)
        self.baseline = torch.tensor(self.rewards / self.seen, device=self.engine.device)

    def surrogates(self, batch: Sequence[ImageExample]) -> tuple[Tensor, Tensor]:
        """What takes the place of the log-probs of policy and reference, -½·kappa·error; each (S,).

        In fp64: their difference is small.
        """
        with autocast(self.config.engine.precision, self.engine.device):
            policy_S = self.draws.errors(self.module, batch, self.number).double()
        ref_S = self._reference_of(batch).to(policy_S)
        half = -0.5 * self.dpo.kappa
        return half * policy_S, half * ref_S

    @torch.no_grad()
    def _reference_of(self, batch: Sequence[ImageExample]) -> Tensor:
        if self.live is None:
            return torch.cat([self.errors_SK[e.id][:, self.number] for e in batch])
        with autocast(self.config.engine.precision, self.engine.device):
            return self.draws.errors(self.live, batch, self.number)

    def losses(self, batch: Sequence[ImageExample]) -> tuple[Tensor, dict[str, Tensor]]:
        policy_S, ref_S = self.surrogates(batch)
        errors = {"error": policy_S.detach(), "reference": ref_S}
        ones_B = torch.ones(len(batch), device=policy_S.device)
        if self.dpo.on_pairs:
            logps = PairLogps(policy_S[0::2], policy_S[1::2], ref_S[0::2], ref_S[1::2], ones_B, ones_B)
            losses_B = combine([self.term], logps)
            numbers = pair_metrics(logps, self.scale)
            numbers |= {f"{of}/chosen": error_S[0::2] for of, error_S in errors.items()}
            numbers |= {f"{of}/rejected": error_S[1::2] for of, error_S in errors.items()}
        else:
            good_B = torch.tensor([e.desirable for e in batch], device=policy_S.device)
            single = UnpairedLogps(policy_S, ref_S, ones_B, good_B, kl=self.kl, baseline=self.baseline)
            losses_B = self.dpo.objective_entry.function(single, **self.term.parameters)
            numbers = unpaired_metrics(single, self.scale)
            numbers |= {f"{of}/chosen": error_S * good_B for of, error_S in errors.items()}
            numbers |= {f"{of}/rejected": error_S * ~good_B for of, error_S in errors.items()}
        return losses_B.sum(), {name: value.sum() for name, value in numbers.items()}

    def _reduce(self, sums: dict[str, Tensor], examples: int) -> dict[str, float]:
        """With the policy's errors over the reference's.

        They are a ratio of sums: at low noise the reference's error of one image can be almost 0.
        """
        values = self._means(sums, examples)
        for side in ("chosen", "rejected"):
            if f"error/{side}" in values:
                # Both are sums of -½·kappa·error.
                values[f"error/{side}"] /= min(values.pop(f"reference/{side}"), -1e-12)
        return values

    def _means(self, sums: dict[str, Tensor], examples: int) -> dict[str, float]:
        if self.dpo.on_pairs:
            return super()._reduce(sums, examples)
        totals = super()._reduce(sums, 1)  # sums over the global batch
        loss = totals.pop("loss")
        counts = {name: total for name, total in totals.items() if name.startswith("count/")}
        return {"loss": loss, **class_means(totals), **counts, "kl": float(self.kl or 0.0)}

    def check_start(self) -> None:
        """Check that policy and reference have the same errors if the policy starts as the reference.

        Raises:
            StageFailed: they differ: the reference's errors are of another model or of other draws.
        """
        if not self.policy_is_reference or not self.dpo.check_rows:
            return
        size, checked = self.dpo.micro_batch_size, checked_at_start(self.examples, self.dpo.check_rows)
        with torch.no_grad():
            parts = [self.surrogates(checked[i : i + size]) for i in range(0, len(checked), size)]
        gap = float(torch.cat([policy_S / ref_S - 1 for policy_S, ref_S in parts]).abs().max())
        if not gap <= (1e-3 if self.config.engine.precision == "fp32" else 0.05):  # also refuses NaN
            raise StageFailed(
                f"before the first step the errors of policy and reference differ by {gap:.2%}",
                "Remove the folder reference-errors from the job's work folder, then run the job again",
            )

    def train(self) -> dict[str, float]:
        last = super().train()
        if self.engine.rank == 0:
            errors = [row.get("error/chosen", 1.0) for row in read_metrics(self.engine.checkpoints.curve)]
            end = float(np.mean(errors[-max(1, len(errors) // 10) :]))
            if end > DISPLACED_ERROR:
                log.warning(
                    "likelihood displacement: the error on chosen images ended at %.2f of the reference's; "
                    "raise kappa, or lower the learning rate or the number of steps",
                    end,
                )
        return last

    def state(self) -> dict[str, Any]:
        return {"rewards": self.rewards, "seen": self.seen}

    def load_state(self, state: dict[str, Any]) -> None:
        self.rewards, self.seen = float(state["rewards"]), int(state["seen"])


def encode(denoiser: Denoiser, rows: Sequence[dict[str, Any]], config: DiffusionConfig) -> list[ImageExample]:
    """The examples of rows, each image and each prompt encoded once.

    Args:
        rows: {id, prompt, chosen, rejected}, or for objectives on single images also {id, prompt, image,
            label}; images are the bytes of PNG or JPEG files, or name them as canonical rows do.
    """
    flat: list[tuple[str, str, tuple[bytes, ...], bool]] = []
    for row in rows:
        if "image" in row:
            flat.append((row["id"], row["prompt"], (_content(row["image"]),), bool(row["label"])))
        elif config.on_pairs:
            flat.append(
                (row["id"], row["prompt"], (_content(row["chosen"]), _content(row["rejected"])), True)
            )
        else:
            flat += [
                (f"{row['id']}/{side}", row["prompt"], (_content(row[side]),), side == "chosen")
                for side in ("chosen", "rejected")
            ]
    if config.on_pairs and any(len(images) == 1 for _, _, images, _ in flat):
        raise StageFailed(
            f"objective '{config.objective}' learns from pairs, and the rows are single images",
            "Set objective to kto or bco",
        )
    texts = _by_value(denoiser.encode_prompts, [prompt for _, prompt, _, _ in flat])
    latents = _by_value(denoiser.encode_images, [image for _, _, images, _ in flat for image in images])
    return [
        ImageExample(name, tuple(latents[image] for image in images), texts[prompt], good)
        for name, prompt, images, good in flat
    ]


def _content(image: bytes | str) -> bytes:
    return read_bytes(image) if isinstance(image, str) else image


def _by_value(function: Any, values: Sequence[Any]) -> dict[Any, Tensor]:
    different = list(dict.fromkeys(values))
    parts = [
        function(different[i : i + _ENCODED_AT_ONCE]).cpu()
        for i in range(0, len(different), _ENCODED_AT_ONCE)
    ]
    return dict(zip(different, (row for part in parts for row in part), strict=True))


def build(job: Job, config: DiffusionConfig) -> tuple[Any, Export]:
    denoiser = load_denoiser(Path(job.model)).on_device()
    examples = encode(denoiser, read_parquet(job.data), config)
    epochs = math.ceil(config.steps(len(examples)) * config.batch_size / max(1, len(examples)))
    draws = Draws(denoiser.noise, min(config.draws, epochs), job.seed)
    # The stage names the reference even if the policy starts as it.
    own = job.reference is None or weights_digest(Path(job.reference)) == weights_digest(Path(job.model))
    other = None if own else load_denoiser(Path(str(job.reference))).on_device().network
    network = denoiser.network
    reference: LogpShard | nn.Module
    if config.reference_errors == "live":
        reference = other or copy.deepcopy(network)
    else:
        reference = _errors(job, other or network, examples, draws, config)
    if config.lora:
        add_lora(network, config.lora, job.seed, language_model=False)
    trainer = DiffusionTrainer(
        network,
        examples,
        config,
        draws=draws,
        reference=reference,
        policy_is_reference=job.policy_is_reference and own,
        work=Path(job.work),
    )

    def export(state: dict[str, Tensor]) -> None:
        load_full_state(network, state)
        if config.lora:
            merge_lora(network)
        denoiser.save(Path(job.out))

    return trainer, export


def _errors(
    job: Job,
    reference: nn.Module,
    examples: Sequence[ImageExample],
    draws: Draws,
    config: DiffusionConfig,
) -> LogpShard:
    """The reference's errors: those that the job names, or those of its work folder, or new ones there."""
    folder = Path(job.reference_logps or Path(job.work) / "reference-errors")
    # One answer for all ranks: rank 0 writes the folder while others look.
    box = [folder.exists() or job.reference_logps is not None]
    torch.distributed.broadcast_object_list(box)
    if box[0]:
        return LogpShard.open(folder)
    shard = reference_errors(reference, examples, draws, config)
    if torch.distributed.get_rank() == 0:
        shard.save(folder)
    return shard
