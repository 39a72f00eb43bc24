"""What a round samples: episodes, scored, and read again by the policy, which is trained, and the reference.

Shapes: B episodes of a micro-batch, R response tokens of the longest.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dpo_core.layout import Document, PaddedRows, pad
from dpo_core.logprobs import Precision, autocast
from dpo_core.scores import hidden_of, token_scores
from dpo_core.tokens import Sequence


@dataclass(frozen=True)
class Episode:
    """One sampled and scored completion."""

    sequence: Sequence
    prompt: str
    group: int
    """Number of its prompt among this rank's prompts of the round."""
    ended: bool
    sampler_logps: tuple[float, ...]
    score: float = 0.0
    gold: float | None = None
    """What a known reward says, where the score is a learned one; nothing is trained on it."""


@dataclass(frozen=True)
class Rollout:
    """One micro-batch of episodes; response-aligned tensors are (B,R), right-padded, 0 after a response."""

    episodes: list[Episode]
    rows: PaddedRows
    mask_BR: Tensor
    logps_BR: Tensor
    ref_logps_BR: Tensor
    sampler_logps_BR: Tensor

    @property
    def lengths_B(self) -> Tensor:
        """Tokens of each response."""
        return self.rows.lengths_S

    def of(self, name: str) -> Tensor:
        """A number of every episode, (B,)."""
        values = [float(getattr(e, name)) for e in self.episodes]
        return torch.tensor(values, device=self.mask_BR.device)


def response_logps(model: nn.Module, rows: PaddedRows, temperature: float) -> tuple[Tensor, Tensor]:
    """Hidden states (N,H) that choose the response tokens, and the tokens' log-probs (B,R)."""
    hidden_NH = hidden_of(model, rows)[rows.predicts_N]
    logps_N = token_scores(model, hidden_NH, rows.targets_N, temperature=temperature)["logps"]
    return hidden_NH, rows.table(logps_N)


@torch.no_grad()
def read(
    episodes: list[Episode],
    policy: nn.Module,
    reference: nn.Module,
    *,
    temperature: float,
    precision: Precision,
    device: torch.device,
) -> Rollout:
    """Log-probs of one micro-batch under policy and reference.

    The same rows are later trained on together, so that the first ratio is exactly 1.
    """
    rows = pad([Document(e.sequence.prompt, (e.sequence.completion,)) for e in episodes]).to(device)
    mask_BR = torch.arange(int(rows.lengths_S.max()), device=device) < rows.lengths_S[:, None]
    with autocast(precision, device):
        _, logps_BR = response_logps(policy, rows, temperature)
        _, ref_logps_BR = response_logps(reference, rows, temperature)
    sampler_N = torch.tensor([x for e in episodes for x in e.sampler_logps], device=device)
    return Rollout(episodes, rows, mask_BR, logps_BR, ref_logps_BR, rows.table(sampler_N))


def micro_batches(episodes: Seq[Episode], size: int) -> list[list[Episode]]:
    """Neighbours in length together, so that little is padding."""
    ordered = sorted(episodes, key=lambda e: len(e.sequence))
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]


def sampler_gap(rollouts: Seq[Rollout]) -> tuple[Tensor, Tensor]:
    """|trainer - sampler| and π_trainer/π_sampler of every response token, each (N,).

    Both are of the same weights. A sampler in bf16 or another kernel differs a little; a large difference
    means that the two do not compute the same policy, and then no ratio of PPO or GRPO is what it says.
    """
    gaps_N = torch.cat([(r.logps_BR - r.sampler_logps_BR)[r.mask_BR] for r in rollouts])
    return gaps_N.abs(), gaps_N.exp()
