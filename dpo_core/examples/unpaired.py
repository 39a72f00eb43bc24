"""Examples of single answers, and the mismatched pairs of KTO's z_0.

Shapes: E training examples.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_core.data.tokens.sequences import TokenSequence
from dpo_core.data.tokens.tokenise import Tokenise
from dpo_core.errors import DataError
from dpo_core.reference import sequence_key


@dataclass(frozen=True)
class UnpairedExample:
    """A completion that is labelled desirable or undesirable."""

    id: str
    sequence: TokenSequence
    desirable: bool


def unpaired_examples(
    tokenise: Tokenise, rows: Sequence[dict[str, Any]]
) -> tuple[list[UnpairedExample], dict[str, int]]:
    """All usable examples of canonical rows, and how many rows were left out for each reason.

    Pairs are split: chosen is desirable, rejected is not. An answer in several pairs counts once for each,
    also with both labels.
    """
    if rows and "chosen" in rows[0]:
        pairs, dropped = tokenise.pairs(rows)
        sides = [(f"{p.id}/{name}", p, name) for p in pairs for name in ("chosen", "rejected")]
        return [UnpairedExample(id_, getattr(p, name), name == "chosen") for id_, p, name in sides], dropped
    examples: list[UnpairedExample] = []
    dropped = {}
    for row in rows:
        sequence_or_reason = tokenise.single(row)
        if isinstance(sequence_or_reason, str):
            dropped[sequence_or_reason] = dropped.get(sequence_or_reason, 0) + 1
        else:
            examples.append(UnpairedExample(row["id"], sequence_or_reason, bool(row["label"])))
    return examples, dropped


def mismatched(examples: Sequence[UnpairedExample]) -> list[TokenSequence]:
    """The prompt of each example with the completion of another example: the pairs of KTO's z_0.

    The partners come from the data set, not from the batch, so that a batch may have any size and order.
    Examples are sorted by the hash of their content; each takes the completion of the next one that has
    another prompt and another completion (or else another completion, or else another prompt). The partners
    are the same in every run, epoch and process, and an added row changes only its neighbours'. Completions
    are truncated so that no pair is longer than the longest example.

    Raises:
        DataError: there are no two different examples.
    """
    order_E = np.array(sorted(range(len(examples)), key=lambda i: sequence_key(examples[i].sequence)), int)
    in_order = [examples[i].sequence for i in order_E]
    partner_E = _next_other(_codes(s.prompt for s in in_order), _codes(s.completion for s in in_order))
    if not len(partner_E) or (partner_E < 0).any():
        raise DataError(
            "KTO compares each prompt with the answer of another example, but there are no two different "
            "training examples",
            "Add rows with other prompts and answers, or choose objective bco",
        )
    longest = max(len(s) for s in in_order)
    pairs: list[TokenSequence] = [in_order[0]] * len(in_order)
    for place, (own, other) in enumerate(zip(order_E, partner_E, strict=True)):
        prompt, partner = in_order[place].prompt, in_order[other]
        completion = partner.completion[: longest - len(prompt)]
        learnt = partner.learnt and partner.learnt[: len(completion)]
        # If truncation leaves no learnt token, all tokens are learnt.
        learnt = learnt if learnt and any(learnt) else None
        pairs[own] = TokenSequence(prompt, completion, len(completion) < len(partner.completion), learnt)
    return pairs


def _codes(values: Iterable[tuple[int, ...]]) -> NDArray[np.int64]:
    seen: dict[tuple[int, ...], int] = {}
    return np.array([seen.setdefault(value, len(seen)) for value in values], np.int64)


def _times(codes_E: NDArray[np.int64]) -> NDArray[np.int64]:
    """How often the code of each example occurs."""
    return np.bincount(codes_E)[codes_E] if len(codes_E) else codes_E


def _next_change(codes_E: NDArray[np.int64]) -> NDArray[np.int64]:
    """The next place (cyclically) with another code, for each place; a search skips equal codes with it."""
    changes = np.flatnonzero(codes_E != np.roll(codes_E, 1))
    following = np.searchsorted(changes, np.arange(len(codes_E)), side="right")
    return changes[following % len(changes)]


def _next_other(prompt_E: NDArray[np.int64], completion_E: NDArray[np.int64]) -> NDArray[np.int64]:
    """Place of each example's partner: the next (cyclically) that differs as much as possible; -1: none."""
    size = len(prompt_E)
    as_prompt_E, as_completion_E = _times(prompt_E), _times(completion_E)
    as_both_E = _times(_codes(zip(prompt_E.tolist(), completion_E.tolist(), strict=True)))
    partner_E = np.full(size, -1)
    # Count first how many differ: the search ends only for an example that has such a partner.
    for differing_E, codes in (
        (size - as_prompt_E - as_completion_E + as_both_E, (prompt_E, completion_E)),
        (size - as_completion_E, (completion_E,)),
        (size - as_prompt_E, (prompt_E,)),
    ):
        left = np.flatnonzero((differing_E > 0) & (partner_E < 0))
        if not left.size:
            continue
        other, skips = (left + 1) % size, [_next_change(code) for code in codes]
        while left.size:
            differs = np.logical_and.reduce([code[left] != code[other] for code in codes])
            partner_E[left[differs]] = other[differs]
            left, other = left[~differs], other[~differs]
            for code, skip in zip(codes, skips, strict=True):
                other = np.where(code[left] == code[other], skip[other], other)
    return partner_E
