"""Attention inside packs (see `layout`): each token sees its document's prompt and its own branch.

Two ways to the same numbers. On a GPU FlexAttention with a block mask that is built from the documents'
borders (compiling a mask function over 16,384 tokens hung the compiler for over a minute). Elsewhere, and
where heads are too small for it, the pack is cut into its documents for the attention alone
(`cpu_attention`); everything else in the model runs on the packed tokens.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dpo_core.errors import ModelError
from dpo_core.scoring.cpu_attention import Bf16Attention, DocumentParts
from dpo_core.scoring.layout import Pack
from dpo_core.scoring.model_shape import head_size

NAME = "dpo"
BLOCK = 128
# FlexAttention's kernels have no smaller heads.
LEAST_HEAD = 16
# Longer documents are left to SDPA, which keeps no probabilities: they grow with the square of a length.
SHORT = 1024


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    parts: DocumentParts | None = None,
    **settings: Any,
) -> tuple[Tensor, Any]:
    """Attention as transformers calls it: query (1, heads, T, d); key and value may have fewer heads.

    One function for packs and for padded rows, chosen by what is handed over: a model keeps it, so that the
    recomputation of a checkpointed layer in the backward pass attends as its forward pass did.
    """
    from torch.nn.attention.flex_attention import BlockMask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if parts is not None:
        return _by_document(query, key, value, parts, **settings), None
    own = "flex_attention" if isinstance(attention_mask, BlockMask) else "sdpa"
    return ALL_ATTENTION_FUNCTIONS[own](module, query, key, value, attention_mask, **settings)


@torch.compiler.disable  # lengths differ in every pack, and each would be compiled anew
def _by_document(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    parts: DocumentParts,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> Tensor:
    """(1, T, heads, d) of a pack.

    Raises:
        ModelError: the architecture asks for attention that packs do not offer.
    """
    unknown = [name for name in ("s_aux", "head_mask") if others.get(name) is not None]
    if softcap or dropout or unknown:
        raise _no_packs()
    parts = parts.within(sliding_window)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    device = query.device.type
    reduced = query.dtype == torch.bfloat16 or torch.is_autocast_enabled(device)
    if reduced and max(parts.lengths) <= SHORT:
        with torch.autocast(device, enabled=False):
            rows = (states.squeeze(0).transpose(0, 1) for states in (query, key, value))
            return Bf16Attention.apply(*rows, parts, scale)[None]
    heads = query.shape[1]
    key, value = (states.repeat_interleave(heads // states.shape[1], dim=1) for states in (key, value))
    split = (states.split(list(parts.lengths), dim=2) for states in (query, key, value))
    pieces = [
        F.scaled_dot_product_attention(q, k, v, bias.to(q.dtype)[None, None], scale=scale)
        for q, k, v, bias in zip(*split, parts.biases, strict=True)
    ]
    return torch.cat(pieces, dim=2).transpose(1, 2)


def _no_packs() -> ModelError:
    return ModelError(
        "the model's attention (soft cap, sinks or dropout) cannot run on packs",
        "Set pack_tokens to null: padded rows serve every model",
    )


def _take_over(model: nn.Module) -> None:
    """Let the model attend by `_attend` from now on; without a pack that is its own SDPA."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    config: Any = model.config
    if config._attn_implementation == NAME:
        return
    if config._attn_implementation != "sdpa":
        raise ModelError(
            f"the model attends by {config._attn_implementation}, and packs need sdpa",
            "Set pack_tokens to null",
        )
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    config._attn_implementation = NAME


@contextmanager
def attention_on_trial(model: nn.Module) -> Iterator[None]:
    """Give a model the attention back that it came with, where the block fails or ends in an exception.

    Some models (Falcon) ask for the name of their attention, and leave their causal mask out under ours.
    """
    config: Any = model.config
    before = config._attn_implementation
    try:
        yield
    except BaseException:
        config._attn_implementation = before
        raise


def checkpoint_layers(model: nn.Module) -> None:
    """Recompute the layers of a language model or of a reward model in the backward pass."""
    trunk: Any = getattr(model, "backbone", model)
    trunk.gradient_checkpointing_enable({"use_reentrant": False})


def trunk_of(model: nn.Module) -> Any:
    """The model without its output head."""
    whole: Any = model
    decoder = whole.get_decoder() if hasattr(model, "get_decoder") else whole.base_model
    # Some classes name their trunk in no way that transformers finds (Llama 4's text model), or their head
    # as it names a trunk (ModernBERT).
    if decoder is whole or isinstance(decoder, nn.Linear):
        decoder = whole.base_model
    return getattr(whole, "model", decoder) if decoder is whole else decoder


def takes(module: nn.Module, argument: str) -> bool:
    """Whether a module's forward pass names this argument; trunks with ALiBi or a state have no positions."""
    return argument in inspect.signature(getattr(module, "forward", module)).parameters


def padded_hidden(model: nn.Module, ids_BT: Tensor, attention_BT: Tensor) -> Tensor:
    """Last hidden states (B, T, H) of right-padded rows, without the output head."""
    trunk = trunk_of(model)
    inputs = {"input_ids": ids_BT, "attention_mask": attention_BT, "use_cache": False}
    if takes(trunk, "position_ids"):
        inputs["position_ids"] = (attention_BT.cumsum(-1) - 1).clamp(min=0)
    return trunk(**inputs).last_hidden_state


def packed_hidden(model: nn.Module, pack: Pack, parts: DocumentParts | None = None) -> Tensor:
    """Last hidden states (T, H) of a pack, without the output head; `parts` where they are known already.

    Raises:
        ModelError: the architecture asks for attention that packs do not offer.
    """
    trunk = trunk_of(model)
    inputs: dict[str, Any] = {"input_ids": pack.ids_T[None], "position_ids": pack.positions_T[None]}
    if pack.ids_T.is_cuda and has_flex_heads(trunk.config) and not _exceeds_window(trunk.config, pack):
        inputs["attention_mask"] = block_mask(pack)
    else:
        inputs["parts"] = parts or DocumentParts.of(pack)
    _take_over(model)
    return trunk(**inputs, use_cache=False).last_hidden_state[0]


def has_flex_heads(config: Any) -> bool:
    """Whether a GPU attends by FlexAttention, which wants heads of some size; else document by document."""
    size = head_size(config) or config.hidden_size // config.num_attention_heads
    return size >= LEAST_HEAD


def _exceeds_window(config: Any, pack: Pack) -> bool:
    """Whether a document reaches beyond a window of some layer: such packs attend document by document, where
    every layer has its own window; one block mask serves all layers."""
    window = getattr(config, "sliding_window", None)
    return bool(window and int(pack.positions_T.max()) >= window)


def block_mask(pack: Pack) -> Any:
    """FlexAttention's mask of a pack whose length is a multiple of 128, from the borders of its documents."""
    from torch.nn.attention.flex_attention import BlockMask

    document_T, branch_T = pack.document_T, pack.branch_T
    documents = document_T.cpu().numpy()

    def visible(_b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        same = document_T[q] == document_T[k]
        return same & (k <= q) & ((branch_T[k] == 0) | (branch_T[k] == branch_T[q]))

    partial_QK, full_QK = _blocks(documents, branch_T.cpu().numpy())

    def table(chosen_QK: np.ndarray) -> tuple[Tensor, Tensor]:
        counts = torch.from_numpy(chosen_QK.sum(1).astype(np.int32))
        # The chosen blocks first, in order; what follows is not read.
        indices = torch.from_numpy(np.argsort(~chosen_QK, axis=1, kind="stable").astype(np.int32))
        return counts[None, None].to(document_T.device), indices[None, None].to(document_T.device)

    some, whole = table(partial_QK), table(full_QK)
    return BlockMask.from_kv_blocks(*some, whole[0], whole[1], BLOCK_SIZE=BLOCK, mask_mod=visible)


def whole_blocks(tokens: int) -> int:
    """The least length for FlexAttention that holds so many tokens."""
    return -(-tokens // BLOCK) * BLOCK


def _blocks(document_T: np.ndarray, branch_T: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(Q, K) blocks that are seen in part, and those seen whole."""
    if len(document_T) % BLOCK:
        raise ValueError(f"a pack for FlexAttention has a multiple of {BLOCK} tokens, not {len(document_T)}")
    documents, branches = document_T.reshape(-1, BLOCK), branch_T.reshape(-1, BLOCK)
    low, high = documents.min(1), documents.max(1)
    below = np.tri(len(low), dtype=bool)
    # Documents lie in order, so two blocks share one exactly when their ranges touch.
    touching = below & (low[:, None] <= high[None, :]) & (low[None, :] <= high[:, None])
    one = low == high
    alone = (branches == branches[:, :1]).all(1)
    prompt = alone & (branches[:, 0] == 0)
    same_branch = alone[:, None] & alone[None, :] & (branches[:, None, 0] == branches[None, :, 0])
    whole = one[:, None] & one[None, :] & (low[:, None] == low[None, :]) & (prompt[None, :] | same_branch)
    full = touching & whole & ~np.eye(len(low), dtype=bool)
    return touching & ~full, full
