"""Lists the sequences whose reference log-probs a method's training reads from the cache."""

from collections.abc import Callable, Sequence
from typing import Any

from dpo_core.data.tokens.sequences import TokenSequence
from dpo_core.data.tokens.tokenise import Tokenise
from dpo_core.examples.unpaired import mismatched, unpaired_examples
from dpo_core.methods.kto import KtoConfig

Sequences = tuple[list[TokenSequence], dict[str, int]]
"""Sequences, and the number of rows that were left out, by reason."""


def cached_sequences(
    method: str, settings: Any, tokenise: Tokenise, rows: Sequence[dict[str, Any]]
) -> Sequences:
    """The sequences of canonical rows, and how many rows were left out for each reason.

    Args:
        method: a method that can read cached log-probs.
        settings: a value of the method's settings class.

    Raises:
        DataError: KTO with fewer than two different examples.
    """
    return CACHED[method](settings, tokenise, rows)


def _of_pairs(settings: Any, tokenise: Tokenise, rows: Sequence[dict[str, Any]]) -> Sequences:
    pairs, dropped = tokenise.pairs(rows)
    return [s for p in pairs for s in (p.chosen, p.rejected)], dropped


def _of_unpaired(settings: KtoConfig, tokenise: Tokenise, rows: Sequence[dict[str, Any]]) -> Sequences:
    """Every example, and for KTO every mismatched pair."""
    examples, dropped = unpaired_examples(tokenise, rows)
    pairs = mismatched(examples) if examples and settings.reads_mismatched else []
    return [e.sequence for e in examples] + pairs, dropped


CACHED: dict[str, Callable[[Any, Tokenise, Sequence[dict[str, Any]]], Sequences]] = {
    "dpo": _of_pairs,
    "kto": _of_unpaired,
}
"""By name of the method."""
