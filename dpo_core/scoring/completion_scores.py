"""Scores completions under a frozen model: plans the forward passes, then log-probs and entropies of each.

`branch_scores` computes each forward pass.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dpo_core.data.tokens.sequences import TokenSequence
from dpo_core.ranks import Ranks, SingleRank
from dpo_core.scoring import flops as cost
from dpo_core.scoring.attention import round_up_to_block
from dpo_core.scoring.autocast import autocast
from dpo_core.scoring.branch_scores import branch_scores
from dpo_core.scoring.document import Document
from dpo_core.scoring.layout import pack, pad
from dpo_core.scoring.model_shape import shape_of
from dpo_core.scoring.packing_check import packing_fault
from dpo_core.scoring.precision import Precision

# Most completions that share one prompt in a pack: with more, attention costs more than the prompt saves.
MAX_SIBLINGS = 4


class CompletionScores(NamedTuple):
    """Scores of one completion of n learnt tokens, on the CPU."""

    logps: Tensor
    """(n,) fp32."""
    entropy: Tensor | None
    """(n,) nats of the next-token distribution at each position, if requested."""


def completion_logps(
    model: nn.Module,
    sequences: Sequence[TokenSequence],
    precision: Precision,
    token_budget: int,
    only: Callable[[int, list[int]], bool] = lambda number, indices: True,
) -> Iterator[dict[int, Tensor]]:
    """Token log-probs of completions, pass by pass: {index of the sequence: (n,) fp32 on the CPU}.

    Args:
        only: whether to compute a pass, given its number and the indices of its sequences.

    Other arguments: `completion_scores`.
    """
    if sequences:
        plan = _plan(model, sequences, token_budget)
        with _weights_cast_once():
            for number, group in enumerate(plan.groups):
                if not only(number, [index for d in group for index in plan.families[d]]):
                    continue
                scores = _pass(model, sequences, plan, group, precision)
                yield {index: score.logps for index, score in scores.items()}


def completion_scores(
    model: nn.Module,
    sequences: Sequence[TokenSequence],
    precision: Precision,
    token_budget: int,
    *,
    entropy: bool = False,
    ranks: Ranks | None = None,
) -> list[CompletionScores]:
    """Scores of completions, in order.

    Runs in eval mode without gradients, batched by length. A prompt is read once for up to four completions,
    or in padded rows if the model cannot be packed.

    Args:
        token_budget: tokens in one forward pass; affects the time, not the values.
        ranks: share the passes; all are called with the same sequences. None: this process computes all.
    """
    if not sequences:
        return []
    plan = _plan(model, sequences, token_budget)

    def compute(group: list[int]) -> list[Any]:
        scores = _pass(model, sequences, plan, group, precision, entropy=entropy)
        return [
            (index, score.logps.tolist(), None if score.entropy is None else score.entropy.tolist())
            for index, score in scores.items()
        ]

    with _weights_cast_once():
        passes = (ranks or SingleRank()).map("scores", plan.groups, compute)
    by_index = {
        index: CompletionScores(torch.tensor(logps), None if spread is None else torch.tensor(spread))
        for rows in passes
        for index, logps, spread in rows
    }
    return [by_index[index] for index in range(len(sequences))]


def _pass(
    model: nn.Module,
    sequences: Sequence[TokenSequence],
    plan: "_Plan",
    group: list[int],
    precision: Precision,
    *,
    entropy: bool = False,
) -> dict[int, CompletionScores]:
    """Scores of the sequences of one forward pass, by their index."""
    model.eval()
    device = next(model.parameters()).device
    chosen = [plan.documents[d] for d in group]
    layout = (pack(chosen, plan.width) if plan.shared else pad(chosen)).to(device)
    with torch.no_grad(), autocast(precision, device):
        scores = branch_scores(model, layout, entropy=entropy)
    logps = scores.logps_SL.cpu()
    spread = None if scores.entropy_SL is None else scores.entropy_SL.cpu()
    by_index = {}
    for row, index in enumerate(index for d in group for index in plan.families[d]):
        part = row, slice(sequences[index].targets)
        by_index[index] = CompletionScores(logps[part], None if spread is None else spread[part])
    return by_index


@contextmanager
def _weights_cast_once() -> Iterator[None]:
    """Keep autocast's bf16 copies of the weights between passes: the weights do not change.

    Autocast drops them at the end of its outermost block; the consumer of the passes must not run in one.
    """
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()


def logprob_flops(model: nn.Module, sequences: Sequence[TokenSequence], token_budget: int) -> float:
    """Operations of `completion_logps`, counted from lengths."""
    if not sequences:
        return 0.0
    shape, plan = shape_of(model), _plan(model, sequences, token_budget)
    passes = [[plan.documents[d] for d in group] for group in plan.groups]
    sizes = [cost.pass_sizes(documents, packed=plan.shared, length=plan.width) for documents in passes]
    return sum(cost.forward(shape, *size) for size in sizes)


@dataclass(frozen=True)
class _Plan:
    """Which completions share a prompt, and which prompts share a forward pass."""

    families: list[list[int]]
    documents: list[Document]
    groups: list[list[int]]
    """Indices of the documents of each pass."""
    shared: bool
    width: int | None


def _plan(model: nn.Module, sequences: Sequence[TokenSequence], token_budget: int) -> _Plan:
    families = _families(sequences, token_budget)
    # Checked only if prompts can be shared: it costs two passes.
    longest = max(len(_document(sequences, family)) for family in families)
    shared = len(families) < len(sequences) and packing_fault(model, longest) is None
    if not shared:
        families, shared = [[i] for i in range(len(sequences))], False
    documents = [_document(sequences, family) for family in families]
    groups = length_batches([len(d) for d in documents], token_budget)
    # Compiled GPU kernels need one shape; on a CPU padding would only cost time.
    width = None
    if shared and next(model.parameters()).is_cuda:
        width = round_up_to_block(max(sum(len(documents[d]) for d in group) for group in groups))
    return _Plan(families, documents, groups, shared, width)


def _families(sequences: Sequence[TokenSequence], token_budget: int) -> list[list[int]]:
    """Indices of sequences with the same prompt, at most `MAX_SIBLINGS` and one pass's tokens together."""
    families: list[list[int]] = []
    open_by_prompt: dict[tuple[int, ...], tuple[list[int], int]] = {}
    for index, sequence in enumerate(sequences):
        family, tokens = open_by_prompt.get(sequence.prompt, ([], 0))
        if not family or len(family) == MAX_SIBLINGS or tokens + len(sequence.completion) > token_budget:
            family, tokens = [], len(sequence.prompt)
            families.append(family)
        family.append(index)
        open_by_prompt[sequence.prompt] = family, tokens + len(sequence.completion)
    return families


def _document(sequences: Sequence[TokenSequence], family: Sequence[int]) -> Document:
    return Document.of(*(sequences[i] for i in family))


def length_batches(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Indices grouped by length, at most `token_budget` padded tokens per group (but at least one row).

    Longest first, so that a batch that does not fit in memory fails at once rather than after an hour.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    groups: list[list[int]] = []
    for index in order:
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= token_budget:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups
