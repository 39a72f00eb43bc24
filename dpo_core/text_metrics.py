"""Numbers about the text that a policy writes."""

from collections.abc import Hashable, Sequence
from itertools import chain


def distinct_n(responses: Sequence[Sequence[Hashable]], n: int, *, length: int) -> float:
    """Unique n-grams over all n-grams, pooled over the responses (Li et al. 2016); 0.0 if there are none.

    The share falls as text grows, so every response is first cut to its first `length` tokens; compare two
    policies at the same `length` and the same number of responses. N-grams do not span responses.

    Args:
        responses: the tokens (ids or words) of each response.

    Raises:
        ValueError: n or length is below 1.
    """
    if n < 1 or length < 1:
        raise ValueError(f"n={n} and length={length} must be at least 1")
    cut = [tuple(response[:length]) for response in responses]
    grams = [[tokens[i : i + n] for i in range(len(tokens) - n + 1)] for tokens in cut]
    total = sum(map(len, grams))
    return len(set(chain.from_iterable(grams))) / total if total else 0.0
