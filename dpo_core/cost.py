"""What a computation costs in floating-point operations, from a model's configuration and token counts alone.

A matrix weight costs 2 operations a token forward and 4 backward (Kaplan et al. 2020, "6N"); scores and
mixing of attention cost 4 times the attention's width for each pair of positions and layer. Pairs of
positions are counted as kernels with a mask compute them: the whole square of a row. Norms and activations
count nothing. What a machine can do at most is timed.

Shapes: T tokens fed, N scored positions (where the output head runs).
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dpo_core.layout import Document

# Backward of attention: four products of the size of forward's two, with the scores kept from forward.
_ATTENTION_BACKWARD = 2


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that decide its cost."""

    parameters: int
    """All of them, tied ones once."""
    trunk: int
    """Weights of the layers' matrices: what every token is multiplied by."""
    head: int
    """Weights of the output head: what every scored position is multiplied by."""
    layers: int
    attention: int
    """Width of the attention: heads x size of a head."""
    vocabulary: int

    @classmethod
    def of(cls, config: Any) -> "Shape":
        """Read off a model that is built without memory, so that any architecture counts as it is.

        Experts count by the share of them that a token meets.
        """
        import torch
        from transformers import AutoModelForCausalLM

        from dpo_core.models import quiet_transformers

        with quiet_transformers(), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        text = config.get_text_config()
        head = model.get_output_embeddings().weight
        embeddings = {m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)} | {head}
        experts = getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None) or 1
        met = getattr(text, "num_experts_per_tok", None) or experts
        matrices = [p for p in model.parameters() if p.ndim >= 2 and p not in embeddings]
        heads = text.num_attention_heads
        width = getattr(text, "head_dim", None) or text.hidden_size // heads
        return cls(
            parameters=sum(p.numel() for p in model.parameters()),
            trunk=sum(p.numel() * met // experts if p.ndim == 3 else p.numel() for p in matrices),
            head=head.numel(),
            layers=text.num_hidden_layers,
            attention=heads * width,
            vocabulary=len(head),
        )


def sizes(document: Document, packed: bool) -> tuple[float, float, float]:
    """Tokens fed, squares of the rows of attention, and scored positions of a document."""
    rows = [len(document)]
    if not packed:
        rows = [len(document.prompt) + len(b) - 1 for b in document.branches]
    return sum(rows), sum(n * n for n in rows), sum(len(b) for b in document.branches)


def forward(shape: Shape, tokens: float, squares: float, scored: float) -> float:
    """Operations of a forward pass.

    Args:
        tokens: T, of all rows or packs together; a shared prompt counts once.
        squares: sum over the rows of attention of their length squared.
        scored: N.
    """
    return 2 * shape.trunk * tokens + _attention(shape, squares) + 2 * shape.head * scored


def training(
    shape: Shape,
    tokens: float,
    squares: float,
    scored: float,
    *,
    checkpointing: bool = False,
    head_again: bool = False,
) -> float:
    """Operations of forward and backward.

    Args:
        checkpointing: the layers run forward once more in the backward pass.
        head_again: so does the head (see `head.KEEP_LOGITS_BYTES`).
    """
    attention = _attention(shape, squares)
    total = 6 * shape.trunk * tokens + (1 + _ATTENTION_BACKWARD) * attention + 6 * shape.head * scored
    if checkpointing:
        total += 2 * shape.trunk * tokens + attention
    return total + (2 * shape.head * scored if head_again else 0)


def generation(shape: Shape, prompts: Iterable[int], new: float) -> float:
    """Operations of sampling `new` tokens after each prompt (lengths), with a cache of keys and values.

    The token sampled last is not fed, and the head runs once a sampled token.
    """
    total = 0.0
    for prompt in prompts:
        # The k-th of the new tokens that are fed looks at prompt + k positions.
        seen = prompt**2 + (new - 1) * prompt + new * (new - 1) / 2
        total += forward(shape, prompt + new - 1, seen, new)
    return total


def _attention(shape: Shape, squares: float) -> float:
    return 4 * shape.layers * shape.attention * squares


def matmul_rate(dtype: Any, seconds: float = 0.5) -> float:
    """Operations a second of a square matrix product on this machine's GPU or CPU, timed for some seconds."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 8192 if device == "cuda" else 1024
    left = torch.randn(size, size, device=device).to(dtype)

    def product() -> None:
        (left @ left)[0, 0].item()  # waits for a GPU

    product()
    start, rounds = time.perf_counter(), 0
    while rounds == 0 or time.perf_counter() - start < seconds:
        product()
        rounds += 1
    return rounds * 2 * size**3 / (time.perf_counter() - start)
