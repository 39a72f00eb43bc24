"""Episodes and rollouts of a round: scored samples, their log-probs, and their assignment to minibatches.

Shapes: B episodes of a micro-batch, R response tokens of the longest.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from dpo_core.data.tokens.image_codes import image_codes
from dpo_core.data.tokens.sequences import TokenSequence
from dpo_core.scoring import lm_head
from dpo_core.scoring.autocast import autocast
from dpo_core.scoring.branch_scores import hidden_of, token_scores
from dpo_core.scoring.document import Document
from dpo_core.scoring.layout import PaddedRows, pad
from dpo_core.scoring.precision import Precision


@dataclass(frozen=True)
class Episode:
    """One sampled and scored completion."""

    sequence: TokenSequence
    prompt: str
    group: int
    """Index of its prompt among this rank's prompts of the round."""
    ended: bool
    sampler_logps: tuple[float, ...]
    score: float = 0.0
    gold: float | None = None
    """A known reward that is logged if the score is a learned one; nothing is trained on it."""
    sample: int = 0
    """Index among the completions of its prompt."""

    @property
    def sort_key(self) -> tuple[int, int]:
        return self.sample, self.group

    def __len__(self) -> int:
        return len(self.sequence)


@dataclass(frozen=True)
class EpisodeItem:
    """An episode to learn from; a subclass adds what its method computes for it."""

    episode: Episode

    @property
    def sort_key(self) -> tuple[int, int]:
        return self.episode.sort_key

    def __len__(self) -> int:
        return len(self.episode)


class MinibatchItem(Protocol):
    """An item of a minibatch: what an optimiser step learns from."""

    @property
    def sort_key(self) -> tuple[int, int]:
        """(sample, group): the first samples of all prompts come first, in the order of the prompts."""

    def __len__(self) -> int:
        """Tokens; items of similar length share a micro-batch."""


Item = TypeVar("Item", bound=MinibatchItem)


@dataclass(frozen=True)
class Rollout:
    """One micro-batch of episodes; response-aligned tensors are (B,R), right-padded, 0 after a response."""

    episodes: list[Episode]
    rows: PaddedRows
    mask_BR: Tensor
    logps_BR: Tensor
    ref_logps_BR: Tensor
    sampler_logps_BR: Tensor
    conditional_BR: Tensor | None = None
    """The policy's log-probs without guidance, where `logps_BR` has it."""

    @property
    def lengths_B(self) -> Tensor:
        """Tokens of each response."""
        return self.rows.lengths_S

    def of(self, name: str) -> Tensor:
        """An attribute of every episode as a tensor (B,)."""
        values = [float(getattr(e, name)) for e in self.episodes]
        return torch.tensor(values, device=self.mask_BR.device)


def response_logps(model: nn.Module, rows: PaddedRows, temperature: float) -> tuple[Tensor, Tensor]:
    """Hidden states (N,H) that predict the response tokens, and the tokens' log-probs (B,R)."""
    hidden_NH = hidden_of(model, rows)[rows.predicts_N]
    logps_N = token_scores(model, hidden_NH, rows.targets_N, temperature=temperature)["logps"]
    return hidden_NH, rows.table(logps_N)


def guided_logps(
    model: nn.Module,
    episodes: Sequence[Episode],
    guidance: float,
    *,
    temperature: float,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Log-probs (B,R) of images in the guided distribution, and in the model's own.

    The guided logits are ℓ_u + w(ℓ_c - ℓ_u) of the prompt (c) and of one that says nothing (u), as in
    sampling; gradients flow through both.
    """
    images = image_codes(model.config)
    assert images, "text has no guidance"
    silent = [
        replace(e, sequence=replace(e.sequence, prompt=images.null_prompt(e.sequence.prompt)))
        for e in episodes
    ]
    given, without = (rows_of(part, device) for part in (episodes, silent))
    given_NV, without_NV = (
        lm_head.logits(model, hidden_of(model, rows)[rows.predicts_N]) for rows in (given, without)
    )
    guided_NV = without_NV + guidance * (given_NV - without_NV)
    guided_BR, own_BR = (
        given.table(torch.log_softmax(logits_NV / temperature, -1).gather(-1, given.targets_N[:, None])[:, 0])
        for logits_NV in (guided_NV, given_NV)
    )
    return guided_BR, own_BR.detach()


@torch.no_grad()
def make_rollout(
    episodes: list[Episode],
    policy: nn.Module,
    reference: nn.Module,
    *,
    temperature: float,
    precision: Precision,
    device: torch.device,
    guidance: float = 1.0,
) -> Rollout:
    """The rollout of one micro-batch: its log-probs under policy and reference.

    Args:
        guidance: of the distributions whose log-probs are learnt from.

    The first pass of training has the same rows in a micro-batch, so that its ratio is exactly 1.
    """
    rows = rows_of(episodes, device)
    mask_BR = leading_mask(rows.lengths_S)
    conditional_BR = None
    with autocast(precision, device):
        if guidance == 1:
            _, logps_BR = response_logps(policy, rows, temperature)
            _, ref_logps_BR = response_logps(reference, rows, temperature)
        else:
            how: dict[str, Any] = {"temperature": temperature, "device": device}
            logps_BR, conditional_BR = guided_logps(policy, episodes, guidance, **how)
            ref_logps_BR, _ = guided_logps(reference, episodes, guidance, **how)
    sampler_N = torch.tensor([x for e in episodes for x in e.sampler_logps], device=device)
    sampler_BR = rows.table(sampler_N)
    return Rollout(episodes, rows, mask_BR, logps_BR, ref_logps_BR, sampler_BR, conditional_BR)


def rows_of(episodes: Sequence[Episode], device: torch.device) -> PaddedRows:
    """One padded row for each episode."""
    return pad([Document(e.sequence.prompt, (e.sequence.completion,)) for e in episodes]).to(device)


def leading_mask(counts_B: Tensor, width: int | None = None) -> Tensor:
    """Mask (B, width): the first `counts_B` places of each row are True. Default width: the largest count."""
    places = torch.arange(int(counts_B.max()) if width is None else width, device=counts_B.device)
    return places < counts_B[:, None]


def padded(rows: Sequence[Tensor]) -> Tensor:
    """Rows of different lengths, right-padded with 0, (B, longest)."""
    return pad_sequence(list(rows), batch_first=True)


def split_minibatches(
    items: Sequence[Item], minibatches: int, *, key: tuple[int, ...], rank: int, world: int
) -> list[list[Item]]:
    """This rank's share of every minibatch of a pass, assigned at random with `key` as the seed.

    A minibatch has S items over all ranks. Items whose numbers are equal modulo S are on one rank; each such
    set is assigned at random, one item to each minibatch. So a minibatch has the same items for any number of
    ranks, the same number on each, and the samples of a prompt are spread over the minibatches.

    Args:
        items: those of this rank, a multiple of `minibatches`.
    """
    ordered = sorted(items, key=lambda item: item.sort_key)
    size = len(ordered) // minibatches
    draws = np.random.default_rng(key).random((size * world, minibatches))
    turns = draws.argsort(axis=1)[rank::world]
    return [[ordered[i + size * turns[i, m]] for i in range(size)] for m in range(minibatches)]


def micro_batches(items: Sequence[Item], size: int) -> list[list[Item]]:
    """Micro-batches of items of similar length, so that there is little padding."""
    ordered = sorted(items, key=len)
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]


def sampler_gap(rollouts: Sequence[Rollout]) -> tuple[Tensor, Tensor]:
    """|log π_trainer - log π_sampler| and π_trainer/π_sampler of every response token, each (N,).

    Both have the same weights. A sampler in bf16 or with another kernel differs a little; a large difference
    means that the two compute different policies, and the ratios of PPO and GRPO are then wrong.
    """
    gaps_N = torch.cat([(r.logps_BR - r.sampler_logps_BR)[r.mask_BR] for r in rollouts])
    return gaps_N.abs(), gaps_N.exp()
