"""Log-probabilities of completion tokens in padded rows; `scores` holds the one definition of the head.

Shapes: B rows, T tokens a row, N completion tokens of the whole batch, H hidden size.
"""

from collections.abc import Sequence as Seq
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dpo_core.attention import padded_hidden
from dpo_core.errors import ModelError
from dpo_core.scores import token_scores
from dpo_core.tokens import Sequence

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Batch:
    """Right-padded rows. `completion_BT` marks completion tokens: data from the tokeniser stage."""

    ids_BT: Tensor
    attention_BT: Tensor
    completion_BT: Tensor

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(self.ids_BT.to(device), self.attention_BT.to(device), self.completion_BT.to(device))


def collate(sequences: Seq[Sequence], pad_id: int = 0) -> Batch:
    """Pad to the longest row. The padding id is arbitrary: masks decide, ids do not.

    Raises:
        ValueError: a sequence has no prompt, so that nothing predicts its first token.
    """
    if not all(s.prompt for s in sequences):
        raise ValueError("a sequence needs at least one prompt token")
    width = max(len(s) for s in sequences)
    ids = torch.full((len(sequences), width), pad_id, dtype=torch.long)
    attention = torch.zeros_like(ids)
    completion = torch.zeros_like(ids, dtype=torch.bool)
    for i, sequence in enumerate(sequences):
        ids[i, : len(sequence)] = torch.tensor(sequence.prompt + sequence.completion)
        attention[i, : len(sequence)] = 1
        completion[i, len(sequence.prompt) : len(sequence)] = True
    return Batch(ids, attention, completion)


def autocast(precision: Precision, device: torch.device | str = "cpu") -> AbstractContextManager[Any]:
    """bf16 autocast over fp32 weights, or nothing."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(torch.device(device).type, torch.bfloat16)


def hidden_states(model: nn.Module, batch: Batch) -> Tensor:
    """Last hidden states (B,T,H) of the trunk, without the output head."""
    return padded_hidden(model, batch.ids_BT, batch.attention_BT)


def token_logps(
    model: nn.Module, batch: Batch, *, temperature: float = 1.0, hidden_BTH: Tensor | None = None
) -> Tensor:
    """log pi(token | everything before it) at completion tokens, 0 elsewhere: (B,T) fp32.

    The logits at position t score the token at t+1, so column t holds the log-prob of token t itself and
    column 0 is always 0. With `temperature`, log-probs are of the distribution that is sampled at it.
    """
    hidden_BTH = hidden_states(model, batch) if hidden_BTH is None else hidden_BTH
    predicts_BT = batch.completion_BT[:, 1:]
    hidden_NH = hidden_BTH[:, :-1][predicts_BT]
    targets_N = batch.ids_BT[:, 1:][predicts_BT]
    logps_N = token_scores(model, hidden_NH, targets_N, temperature=temperature)["logps"]
    out_BT = torch.zeros(batch.ids_BT.shape, dtype=torch.float32, device=hidden_BTH.device)
    # Index assignment out of place, so that autograd reaches logps_N.
    return out_BT.index_put(
        tuple(index + shift for index, shift in zip(predicts_BT.nonzero(as_tuple=True), (0, 1), strict=True)),
        logps_N,
    )


@torch.no_grad()
def check_definition(model: nn.Module, batch: Batch, tolerance: float = 1e-3) -> None:
    """Refuse an architecture whose own logits differ from trunk + head (scaled or shifted logits).

    Raises:
        ModelError: the log-probs of the model's own forward differ by more than `tolerance` nats.
    """
    ours_BT = token_logps(model, batch)
    logits_BTV = model(input_ids=batch.ids_BT, attention_mask=batch.attention_BT).logits.float()
    theirs_BT = torch.log_softmax(logits_BTV[:, :-1], -1).gather(-1, batch.ids_BT[:, 1:, None]).squeeze(-1)
    gap = (ours_BT[:, 1:] - theirs_BT)[batch.completion_BT[:, 1:]].abs().max().item()
    if not gap <= tolerance:
        raise ModelError(
            f"the model scales or shifts its logits in an unknown way (log-probs differ by {gap:.2g})",
            "Use a model whose output head is a plain linear layer",
        )


def length_batches(lengths: Seq[int], token_budget: int) -> list[list[int]]:
    """Indices grouped by length, each group at most `token_budget` padded tokens (always at least one row).

    Longest first, so that a batch that does not fit in memory fails at once and not after an hour.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    groups: list[list[int]] = []
    for index in order:
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= token_budget:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups
