"""Text metrics of a policy's answers: distinct-n and self-BLEU."""

from collections.abc import Hashable, Sequence
from itertools import chain

from sacrebleu import sentence_bleu

from dpo_core.errors import StageFailed


def distinct_n(responses: Sequence[Sequence[Hashable]], n: int, *, length: int) -> float:
    """Unique n-grams over all n-grams, pooled over the responses (Li et al. 2016); 0.0 if there are none.

    The share falls as texts get longer, so each response is cut to its first `length` tokens. Compare
    policies at the same `length` and number of responses. N-grams do not cross responses.

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


def self_bleu(answers: Sequence[Sequence[str]]) -> list[float]:
    """Self-BLEU of each prompt (Zhu et al. 2018, Texygen): 1 if all answers are equal, 0 without overlap.

    The mean over a prompt's answers of BLEU-4 with the other answers as references, computed by sacrebleu's
    `sentence_bleu` (13a tokens, exponential smoothing, effective order) and scaled to 0 to 1. It rises with
    the number of answers, so compare policies at the same number. An empty answer scores 0.

    Args:
        answers: the sampled texts of each prompt.

    Raises:
        StageFailed: a prompt has fewer than two answers.
    """
    values = []
    for place, texts in enumerate(answers):
        if len(texts) < 2:
            raise StageFailed(
                f"prompt {place + 1} of {len(answers)} has {len(texts)} answer(s); self-BLEU needs two",
                "Sample at least two answers per prompt",
            )
        others = [[*texts[:i], *texts[i + 1 :]] for i in range(len(texts))]
        scores = [sentence_bleu(text, rest).score for text, rest in zip(texts, others, strict=True)]
        # For equal texts the geometric mean is 100 only up to rounding.
        values.append(min(1.0, sum(scores) / len(scores) / 100))
    return values
