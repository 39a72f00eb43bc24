"""Reads the shape of a model from the model itself or from its config."""

from collections.abc import Iterable
from typing import Any

import torch

from dpo_core.models.build import build
from dpo_core.models.load import used_parameters
from dpo_core.models.transformers_lock import quiet_transformers
from dpo_core.scoring.flops import Shape


def shape_of_config(config: Any) -> Shape:
    """The shape of a causal language model, read from a model built on the meta device."""
    with quiet_transformers(), torch.device("meta"):
        return shape_of(build(config))


def shape_of(module: Any) -> Shape:
    """The shape of a causal language model or a reward model whose weights ZeRO 3 has not partitioned.

    Experts count by the share that is active for a token.
    """
    # Not by the attribute `backbone`: Mamba's trunk has that name too.
    trunk = module if hasattr(module, "get_output_embeddings") else module.backbone
    head = (module.get_output_embeddings() if trunk is module else module.head).weight
    text = trunk.config.get_text_config()
    embeddings = {m.weight for m in module.modules() if isinstance(m, torch.nn.Embedding)} | {head}
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    experts = next((n for name in names if (n := getattr(text, name, None))), 1)
    active = getattr(text, "num_experts_per_tok", None) or experts

    def count(weights: Iterable[Any]) -> int:
        return sum(p.numel() * active // experts if p.ndim == 3 else p.numel() for p in weights)

    used = used_parameters(trunk) or set(module.parameters())
    matrices = [p for p in module.parameters() if p.ndim >= 2 and p in used and p not in embeddings]
    heads = getattr(text, "num_attention_heads", 0)  # none in state-space models
    width = head_size(text) or (text.hidden_size // heads if heads else 0)
    return Shape(
        parameters=sum(p.numel() for p in module.parameters()),
        trunk=count(matrices),
        head=head.numel(),
        layers=text.num_hidden_layers,
        attention=heads * width,
        vocabulary=len(head),
        frozen_trunk=count(p for p in matrices if not p.requires_grad),
        frozen_head=0 if head.requires_grad else head.numel(),
    )


def head_size(config: Any) -> int | None:
    """The size of an attention head in a config; None if it has none, or one per layer."""
    try:
        return getattr(config, "head_dim", None)
    except Exception:  # transformers raises its own error for sizes that differ between layers
        return None
