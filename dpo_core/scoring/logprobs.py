"""Log-probs of given completions under a frozen model: which share a forward pass, in which precision.

`branch_scores` defines a log-prob.
"""

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dpo_core.data.tokens.tokenise import Sequence
from dpo_core.ranks import Alone, Ranks
from dpo_core.scoring import flops as cost
from dpo_core.scoring.attention import whole_blocks
from dpo_core.scoring.autocast import autocast
from dpo_core.scoring.branch_scores import branch_scores
from dpo_core.scoring.document import Document
from dpo_core.scoring.layout import pack, pad
from dpo_core.scoring.model_shape import shape_of
from dpo_core.scoring.packing_check import packing_fault
from dpo_core.scoring.precision import Precision

# Completions that share one prompt in a pack: attention over more of them costs what the prompt saves.
SIBLINGS = 4


class CompletionScores(NamedTuple):
    """Of one completion of n learnt tokens, on the CPU."""

    logps: Tensor
    """(n,) fp32."""
    entropy: Tensor | None
    """(n,) nats of the next-token distribution at each position, where asked for."""


def completion_logps(
    model: nn.Module,
    sequences: Seq[Sequence],
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
                yield {index: one.logps for index, one in scores.items()}


def completion_scores(
    model: nn.Module,
    sequences: Seq[Sequence],
    precision: Precision,
    token_budget: int,
    *,
    entropy: bool = False,
    ranks: Ranks | None = None,
) -> list[CompletionScores]:
    """Scores of completions, in order.

    eval mode, no gradients, batched by length. A prompt is read once for up to four completions; a model that
    cannot share it gets padded rows.

    Args:
        token_budget: tokens in one forward pass; decides the time, not the values.
        ranks: share the passes, all called with the same sequences; empty: this process computes all.
    """
    if not sequences:
        return []
    plan = _plan(model, sequences, token_budget)

    def compute(group: list[int]) -> list[Any]:
        scores = _pass(model, sequences, plan, group, precision, entropy=entropy)
        return [
            (index, one.logps.tolist(), None if one.entropy is None else one.entropy.tolist())
            for index, one in scores.items()
        ]

    with _weights_cast_once():
        passes = (ranks or Alone()).map("scores", plan.groups, compute)
    found = {
        index: CompletionScores(torch.tensor(logps), None if spread is None else torch.tensor(spread))
        for one in passes
        for index, logps, spread in one
    }
    return [found[index] for index in range(len(sequences))]


def _pass(
    model: nn.Module,
    sequences: Seq[Sequence],
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
    found = {}
    for place, index in enumerate(index for d in group for index in plan.families[d]):
        part = place, slice(sequences[index].targets)
        found[index] = CompletionScores(logps[part], None if spread is None else spread[part])
    return found


@contextmanager
def _weights_cast_once() -> Iterator[None]:
    """Keep autocast's bf16 copies of the weights from one pass to the next: the weights do not change.

    Autocast drops them where its outermost block ends; whoever consumes the passes must not run inside one.
    """
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()


def read_flops(model: nn.Module, sequences: Seq[Sequence], token_budget: int) -> float:
    """Operations of `completion_logps`, counted from lengths."""
    if not sequences:
        return 0.0
    shape, plan = shape_of(model), _plan(model, sequences, token_budget)
    passes = [[plan.documents[d] for d in group] for group in plan.groups]
    sizes = [cost.pass_sizes(one, packed=plan.shared, length=plan.width) for one in passes]
    return sum(cost.forward(shape, *one) for one in sizes)


@dataclass(frozen=True)
class _Plan:
    """Which completions share a prompt, and which prompts a forward pass."""

    families: list[list[int]]
    documents: list[Document]
    groups: list[list[int]]
    """Numbers of the documents of each pass."""
    shared: bool
    width: int | None


def _plan(model: nn.Module, sequences: Seq[Sequence], token_budget: int) -> _Plan:
    families = _families(sequences, token_budget)
    # Tried only where there is something to share: it costs two passes.
    longest = max(len(_document(sequences, family)) for family in families)
    shared = len(families) < len(sequences) and packing_fault(model, longest) is None
    if not shared:
        families, shared = [[i] for i in range(len(sequences))], False
    documents = [_document(sequences, family) for family in families]
    groups = length_batches([len(d) for d in documents], token_budget)
    # Compiled kernels want one shape; a CPU does not, and would only compute on padding.
    width = None
    if shared and next(model.parameters()).is_cuda:
        width = whole_blocks(max(sum(len(documents[d]) for d in group) for group in groups))
    return _Plan(families, documents, groups, shared, width)


def _families(sequences: Seq[Sequence], token_budget: int) -> list[list[int]]:
    """Indices of sequences with one prompt, at most `SIBLINGS` of them and a pass full together."""
    families: list[list[int]] = []
    open_by_prompt: dict[tuple[int, ...], tuple[list[int], int]] = {}
    for index, sequence in enumerate(sequences):
        family, tokens = open_by_prompt.get(sequence.prompt, ([], 0))
        if not family or len(family) == SIBLINGS or tokens + len(sequence.completion) > token_budget:
            family, tokens = [], len(sequence.prompt)
            families.append(family)
        family.append(index)
        open_by_prompt[sequence.prompt] = family, tokens + len(sequence.completion)
    return families


def _document(sequences: Seq[Sequence], family: Seq[int]) -> Document:
    return Document.of(*(sequences[i] for i in family))


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
