"""Estimates the training of each method: tokens, operations and the fullest micro-batch."""

import math
from collections.abc import Callable
from typing import Any

from dpo_core.estimates.estimate import EstimatedWork, Examples, Inputs, loop, rounds, with_forward_pass
from dpo_core.methods.diffusion import DiffusionConfig
from dpo_core.methods.diffusion_sft import DiffusionSftConfig
from dpo_core.methods.dpo import DpoConfig
from dpo_core.methods.kto import KtoConfig
from dpo_core.methods.online_dpo import OnlineDpoConfig
from dpo_core.methods.ppo import PpoConfig
from dpo_core.methods.reward import RewardModelConfig
from dpo_core.methods.sft import SftConfig
from dpo_core.scoring.document import Document


def estimate_training(method: str, settings: Any, inputs: Inputs) -> EstimatedWork:
    """The estimated work of a training with a method of the registry.

    Args:
        settings: a value of the method's settings class.
    """
    return ESTIMATES[method](settings, inputs)


def _diffusion(config: DiffusionConfig, inputs: Inputs) -> EstimatedWork:
    """With the reference's errors of every draw, or its forward pass in each step; and that of z_0."""
    pairs = inputs.examples("pairs", config.limit)
    count = pairs.count if config.on_pairs else 2 * pairs.count
    sides = 2 if config.on_pairs else 1
    trained = config.steps(count) * min(config.batch_size, count) * sides
    live = config.reference_errors == "live"
    passes = 3 + live + (not config.on_pairs) + config.engine.gradient_checkpointing
    draws = min(config.draws, math.ceil(config.steps(count) * config.batch_size / max(1, count)))
    once = 0 if live else count * sides * draws
    return _of_images(config, (trained * passes + once) * inputs.image_flops, pairs.note)


def _diffusion_sft(config: DiffusionSftConfig, inputs: Inputs) -> EstimatedWork:
    """Without the text encoder."""
    images = inputs.examples("demonstrations")
    count = images.count
    trained = config.steps(count) * min(config.batch_size, count)
    passes = 3 + config.engine.gradient_checkpointing
    return _of_images(config, trained * passes * inputs.image_flops, images.note)


def _of_images(config: DiffusionConfig | DiffusionSftConfig, flops: float, note: str) -> EstimatedWork:
    engine = config.engine
    return EstimatedWork(flops=flops, precision=engine.precision, engine=engine, note=note)


def _dpo(config: DpoConfig, inputs: Inputs) -> EstimatedWork:
    """With a live reference, one more forward pass over every example."""
    work = loop(config, inputs.examples("pairs", config.limit), inputs)
    return with_forward_pass(work, inputs.shape, references=1) if config.needs_live_reference else work


def _kto(config: KtoConfig, inputs: Inputs) -> EstimatedWork:
    """With the forward pass of the policy for KTO's z_0 or BCO's delta."""
    work = loop(config, inputs.examples("unpaired", config.limit), inputs)
    return with_forward_pass(work, inputs.shape, references=0)


def _online_dpo(config: OnlineDpoConfig, inputs: Inputs) -> EstimatedWork:
    """Two of each prompt's samples are learnt from, the best and the worst."""
    return rounds(config, inputs, learnt=2 / config.completions_per_prompt)


def _ppo(config: PpoConfig, inputs: Inputs) -> EstimatedWork:
    """With the forward passes and updates of the critic."""
    return rounds(config, inputs, critic=True)


def _reward(config: RewardModelConfig, inputs: Inputs) -> EstimatedWork:
    """The head runs only on the last token of an answer."""
    pairs = inputs.examples("pairs")
    ends = [Document(d.prompt + d.branches[0], tuple(b[-1:] for b in d.branches)) for d in pairs.documents]
    return loop(config, Examples(ends, pairs.count, pairs.note), inputs)


def _sft(config: SftConfig, inputs: Inputs) -> EstimatedWork:
    return loop(config, inputs.examples("demonstrations"), inputs)


ESTIMATES: dict[str, Callable[[Any, Inputs], EstimatedWork]] = {
    "diffusion": _diffusion,
    "diffusion_sft": _diffusion_sft,
    "dpo": _dpo,
    "grpo": rounds,
    "kto": _kto,
    "online_dpo": _online_dpo,
    "ppo": _ppo,
    "reward": _reward,
    "sft": _sft,
}
"""By name of the method."""
