"""Seeded batched sampling of completions from a model."""

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from dpo_core.data.tokens.image_codes import ImageCodes, image_codes
from dpo_core.errors import NeedsNewSettings
from dpo_core.generation.config import SamplingConfig
from dpo_core.generation.next_token import cache_is_exact, open_rows
from dpo_core.ranks import Ranks, SingleRank
from dpo_core.scoring.autocast import effective_precision


@dataclass(frozen=True)
class Completion:
    """A sampled completion, without padding."""

    ids: tuple[int, ...]
    ended: bool
    """Whether it ends with a stop token, which is then the last of `ids`; an image always ends."""
    logps: tuple[float, ...] = field(default=(), compare=False)
    """Log-prob of each token under the sampler, at the temperature of sampling. Training computes its own;
    their difference shows how much the two models differ."""


@torch.no_grad()
def sample(
    model: torch.nn.Module,
    prompts: Sequence[tuple[int, ...]],
    config: SamplingConfig,
    *,
    eos_id: int | Collection[int],
    seed: int,
    places: Sequence[int] | None = None,
    ranks: Ranks | None = None,
) -> list[Completion]:
    """One completion for each prompt (repeat a prompt to get more).

    The random numbers of a completion depend on the seed and its place, so the samples do not depend on the
    batch size or the number of ranks. The global random state is not used.

    Args:
        model: a transformers causal language model in eval mode.
        prompts: token ids of each prompt.
        eos_id: the token or tokens that end a completion (`Tokenise.stop_ids`).
        places: the number of each prompt among those of all ranks; by default its index in `prompts`.
        ranks: the ranks that share the batches, each called with the same prompts; None: this process only.
    """
    images = image_codes(model.config)
    require_fitting(config, images)
    stops = frozenset([eos_id] if isinstance(eos_id, int) else eos_id) if images is None else frozenset()
    cache_is_exact(model)  # checked in full precision; the copy below has the result
    precision = effective_precision(config.precision, next(model.parameters()).device)
    sampler = copy.deepcopy(model).to(torch.bfloat16) if precision == "bf16" else model
    places = range(len(prompts)) if places is None else places
    # Prompts of similar length share a batch, so that there is little padding.
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    batches = [order[start : start + config.batch_size] for start in range(0, len(order), config.batch_size)]

    def draw(batch: list[int]) -> list[list[tuple[int, float]]]:
        uniforms_BT = np.stack(
            [np.random.default_rng((seed, places[i])).random(config.max_new_tokens) for i in batch]
        )
        return _generate(sampler, [prompts[i] for i in batch], config, stops, torch.from_numpy(uniforms_BT))

    drawn = (ranks or SingleRank()).map("samples", batches, draw, [len(batch) for batch in batches])
    results: dict[int, Completion] = {}
    for batch, completions in zip(batches, drawn, strict=True):
        for index, tokens in zip(batch, completions, strict=True):
            ids, logps = zip(*tokens, strict=True)
            results[index] = Completion(ids, images is not None or ids[-1] in stops, logps)
    return [results[index] for index in range(len(prompts))]


def require_fitting(config: SamplingConfig, images: ImageCodes | None) -> None:
    """Refuse settings that are not those of the model's completions.

    Raises:
        NeedsNewSettings: guidance of a model of text, or another length than that of the model's images.
    """
    if images is None and config.guidance != 1:
        raise NeedsNewSettings(
            "the model writes text, which is sampled without guidance", "Remove guidance from sampling"
        )
    if images and config.max_new_tokens != images.length:
        raise NeedsNewSettings(
            f"an image of this model has {images.length} tokens, and sampling.max_new_tokens is "
            f"{config.max_new_tokens}",
            f"Set max_new_tokens to {images.length} in every sampling section",
        )


def _generate(
    model: torch.nn.Module,
    prompts: list[tuple[int, ...]],
    config: SamplingConfig,
    stops: frozenset[int],
    uniforms_BT: Tensor,
) -> list[list[tuple[int, float]]]:
    """Ids and log-probs of each completion, including its stop token. Ended rows leave the batch."""
    device = next(model.parameters()).device
    completions: list[list[tuple[int, float]]] = [[] for _ in prompts]
    stops_E = torch.tensor(sorted(stops), device=device)
    live_B = torch.arange(len(prompts))
    rows = open_rows(model, prompts, config.guidance)
    for step in range(config.max_new_tokens):
        logits_BV = rows.logits()
        uniforms_B = uniforms_BT[live_B, step].to(logits_BV.device)
        next_B, logps_B = _draw(logits_BV, config.temperature, uniforms_B)
        for row, token, logp in zip(live_B.tolist(), next_B.tolist(), logps_B.tolist(), strict=True):
            completions[row].append((token, logp))
        continues_B = ~torch.isin(next_B, stops_E).cpu()
        if not continues_B.any():
            break
        if not continues_B.all():
            keep = continues_B.nonzero().squeeze(-1).to(logits_BV.device)
            rows.keep(keep)
            next_B, live_B = next_B[keep], live_B[continues_B]
        rows.extend(next_B)
    return completions


def _draw(logits_BV: Tensor, temperature: float, uniforms_B: Tensor) -> tuple[Tensor, Tensor]:
    """A token for each row and its log-prob, by inverting the cumulative distribution at a uniform number."""
    logps_BV = torch.log_softmax(logits_BV.float() / temperature, dim=-1)
    cdf_BV = logps_BV.exp().double().cumsum(-1)
    # The last entry is 1 except for rounding; scaling by it keeps every draw inside the vocabulary.
    picked_B1 = torch.searchsorted(cdf_BV, (uniforms_B * cdf_BV[:, -1])[:, None], right=True)
    picked_B1 = picked_B1.clamp(max=logits_BV.shape[-1] - 1)
    return picked_B1.squeeze(-1), logps_BV.gather(-1, picked_B1).squeeze(-1)
