"""Seeded batched sampling of completions from a model."""

import hashlib
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from pydantic import Field

from dpo_core.config import Config


class SamplingConfig(Config):
    """How completions are drawn. No top-k, no top-p: samples must come from the policy itself."""

    max_new_tokens: int = Field(24, ge=1)
    """Most tokens of a completion; a completion cut here does not end with end-of-sequence."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature. KL estimates need 1.0."""
    batch_size: int = Field(64, ge=1)
    """Completions drawn at once."""


@dataclass(frozen=True)
class Completion:
    """A sampled completion: ids without padding; `ended` when the model itself ended it (eos included)."""

    ids: tuple[int, ...]
    ended: bool


def seed_for(seed: int, *parts: object) -> int:
    """A 63-bit seed from a base seed and names, so that every batch has its own stream."""
    text = "\0".join(map(str, (seed, *parts)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


@torch.no_grad()
def sample(
    model: torch.nn.Module,
    prompts: Seq[tuple[int, ...]],
    config: SamplingConfig,
    *,
    eos_id: int,
    seed: int,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Completion]:
    """One completion a prompt (repeat a prompt to get more).

    Deterministic for the same prompts in the same order, config and seed. The global random state is left as
    it was.

    Args:
        model: a transformers causal language model in eval mode.
        prompts: token ids, one tuple a completion wanted.
        eos_id: the token that ends a completion.
        progress: called with the number of completions drawn so far.
    """
    device = next(model.parameters()).device
    results: list[Completion | None] = [None] * len(prompts)
    # Neighbours in length share a batch, so that little of it is padding.
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    done = 0
    for start in range(0, len(order), config.batch_size):
        indices = order[start : start + config.batch_size]
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed_for(seed, "sample", start))
            drawn = _generate(model, [prompts[i] for i in indices], config, eos_id, device)
        for index, completion in zip(indices, drawn, strict=True):
            results[index] = completion
        done += len(indices)
        progress(done)
    return [result for result in results if result is not None]


def _generate(
    model: torch.nn.Module,
    prompts: list[tuple[int, ...]],
    config: SamplingConfig,
    eos_id: int,
    device: torch.device,
) -> list[Completion]:
    from transformers import GenerationConfig

    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), eos_id, dtype=torch.long, device=device)
    attention = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        # Left padding: all rows end where their completion begins.
        ids[i, width - len(prompt) :] = torch.tensor(prompt, device=device)
        attention[i, width - len(prompt) :] = 1
    generation = GenerationConfig(
        do_sample=True,
        temperature=config.temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=config.max_new_tokens,
        eos_token_id=eos_id,
        pad_token_id=eos_id,
        bos_token_id=None,
    )
    output = model.generate(input_ids=ids, attention_mask=attention, generation_config=generation)  # type: ignore[operator]
    return [_cut(row, eos_id) for row in output[:, width:].tolist()]


def _cut(ids: list[int], eos_id: int) -> Completion:
    """Everything up to and with the first end-of-sequence token; what follows is padding."""
    if eos_id in ids:
        return Completion(tuple(ids[: ids.index(eos_id) + 1]), True)
    return Completion(tuple(ids), False)
