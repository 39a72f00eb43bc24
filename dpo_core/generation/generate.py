"""Seeded batched sampling of completions from a model."""

import copy
from collections.abc import Collection
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from dpo_core.generation.config import SamplingConfig
from dpo_core.generation.next_token import cache_is_exact, open_rows
from dpo_core.ranks import Ranks, SingleRank
from dpo_core.scoring.autocast import effective_precision


@dataclass(frozen=True)
class Completion:
    """A sampled completion: ids without padding; `ended` when the model ended it itself (end included)."""

    ids: tuple[int, ...]
    ended: bool
    logps: tuple[float, ...] = field(default=(), compare=False)
    """Log-prob of each token under the sampler, at the temperature of sampling. What trains computes its own;
    the difference says how far the two are apart."""


@torch.no_grad()
def sample(
    model: torch.nn.Module,
    prompts: Seq[tuple[int, ...]],
    config: SamplingConfig,
    *,
    eos_id: int | Collection[int],
    seed: int,
    places: Seq[int] | None = None,
    ranks: Ranks | None = None,
) -> list[Completion]:
    """One completion a prompt (repeat a prompt to get more).

    Every completion has random numbers of its own, drawn from the seed and its place: neither the batch size
    nor the number of ranks decides what is sampled, and the global random state is neither read nor moved.

    Args:
        model: a transformers causal language model in eval mode.
        prompts: token ids, one tuple a completion wanted.
        eos_id: the tokens that end a completion (`Tokenise.stop_ids`), or the only one.
        places: the place of each prompt among those of all ranks; its place in `prompts` when empty.
        ranks: share the batches, all called with the same prompts; empty: this process draws all.
    """
    stops = frozenset([eos_id] if isinstance(eos_id, int) else eos_id)
    cache_is_exact(model)  # tried in full precision; a copy keeps the answer
    precision = effective_precision(config.precision, next(model.parameters()).device)
    sampler = copy.deepcopy(model).to(torch.bfloat16) if precision == "bf16" else model
    places = range(len(prompts)) if places is None else places
    # Neighbours in length share a batch, so that little of it is padding.
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
            results[index] = Completion(ids, ids[-1] in stops, logps)
    return [results[index] for index in range(len(prompts))]


def _generate(
    model: torch.nn.Module,
    prompts: list[tuple[int, ...]],
    config: SamplingConfig,
    stops: frozenset[int],
    uniforms_BT: Tensor,
) -> list[list[tuple[int, float]]]:
    """Ids and log-probs of each completion, its end included. Finished rows leave the batch."""
    device = next(model.parameters()).device
    completions: list[list[tuple[int, float]]] = [[] for _ in prompts]
    stops_E = torch.tensor(sorted(stops), device=device)
    live_B = torch.arange(len(prompts))
    rows = open_rows(model, prompts)
    for step in range(config.max_new_tokens):
        logits_BV = rows.logits()
        uniforms_B = uniforms_BT[live_B, step].to(logits_BV.device)
        next_B, logps_B = _draw(logits_BV, config.temperature, uniforms_B)
        for row, token, logp in zip(live_B.tolist(), next_B.tolist(), logps_B.tolist(), strict=True):
            completions[row].append((token, logp))
        going_B = ~torch.isin(next_B, stops_E).cpu()
        if not going_B.any():
            break
        if not going_B.all():
            keep = going_B.nonzero().squeeze(-1).to(logits_BV.device)
            rows.keep(keep)
            next_B, live_B = next_B[keep], live_B[going_B]
        rows.extend(next_B)
    return completions


def _draw(logits_BV: Tensor, temperature: float, uniforms_B: Tensor) -> tuple[Tensor, Tensor]:
    """One token a row, by inverting the cumulative distribution at a uniform number in [0, 1), with its
    log-prob."""
    logps_BV = torch.log_softmax(logits_BV.float() / temperature, dim=-1)
    cdf_BV = logps_BV.exp().double().cumsum(-1)
    # The last entry is 1 but for rounding; scaling by it keeps every draw inside the vocabulary.
    picked_B1 = torch.searchsorted(cdf_BV, (uniforms_B * cdf_BV[:, -1])[:, None], right=True)
    picked_B1 = picked_B1.clamp(max=logits_BV.shape[-1] - 1)
    return picked_B1.squeeze(-1), logps_BV.gather(-1, picked_B1).squeeze(-1)
