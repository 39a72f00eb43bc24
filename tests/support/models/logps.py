"""Log-probs the long way, for comparison: one sequence at a time, from all of the model's own logits."""

from typing import Any

import torch
from torch import Tensor

from dpo_core.data.tokens.sequences import TokenSequence


def full_logps(model: Any, sequence: TokenSequence, temperature: float = 1.0) -> Tensor:
    """log π of each completion token, (n,). Differentiable."""
    ids_1T = torch.tensor([sequence.prompt + sequence.completion])
    logits_TV = model(input_ids=ids_1T).logits[0, :-1].float() / temperature
    logps_T = torch.log_softmax(logits_TV, -1).gather(-1, ids_1T[0, 1:, None])[:, 0]
    return logps_T[len(sequence.prompt) - 1 :]


def random_sequences(count: int, vocabulary: int, seed: int = 0, longest: int = 12) -> list[TokenSequence]:
    """Sequences of random ids, prompts and completions of 1 to `longest` - 1 tokens."""
    draw = torch.Generator().manual_seed(seed)

    def ids() -> tuple[int, ...]:
        length = int(torch.randint(1, longest, (1,), generator=draw))
        return tuple(torch.randint(0, vocabulary, (length,), generator=draw).tolist())

    return [TokenSequence(ids(), ids()) for _ in range(count)]
