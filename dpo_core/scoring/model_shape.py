"""The sizes of a model, read off the model itself or off its configuration."""

from collections.abc import Iterable
from typing import Any

import torch

from dpo_core.models.build import build
from dpo_core.models.transformers_lock import quiet_transformers
from dpo_core.scoring.flops import Shape


def shape_of_config(config: Any) -> Shape:
    """The shape of a causal language model that is built without memory, so that any architecture counts."""
    with quiet_transformers(), torch.device("meta"):
        return shape_of(build(config))


def shape_of(module: Any) -> Shape:
    """The shape of a causal language model or a reward model, as long as ZeRO 3 has not cut its weights up.

    Experts count by the share of them that a token meets.
    """
    # Not by the name `backbone`: Mamba calls its own trunk so.
    trunk = module if hasattr(module, "get_output_embeddings") else module.backbone
    head = (module.get_output_embeddings() if trunk is module else module.head).weight
    text = trunk.config.get_text_config()
    embeddings = {m.weight for m in module.modules() if isinstance(m, torch.nn.Embedding)} | {head}
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    experts = next((n for name in names if (n := getattr(text, name, None))), 1)
    met = getattr(text, "num_experts_per_tok", None) or experts

    def count(weights: Iterable[Any]) -> int:
        return sum(p.numel() * met // experts if p.ndim == 3 else p.numel() for p in weights)

    matrices = [p for p in module.parameters() if p.ndim >= 2 and p not in embeddings]
    heads = getattr(text, "num_attention_heads", 0)  # none where a state does their work
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
    """The size of an attention head that a config names; None where it names none, or one a layer."""
    try:
        return getattr(config, "head_dim", None)
    except Exception:  # transformers raises an error of its own for sizes that differ from layer to layer
        return None
