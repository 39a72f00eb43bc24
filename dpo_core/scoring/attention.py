"""Attention inside packs (see `layout`): each token attends to its document's prompt and its own branch.

There are two implementations with the same result. A GPU runs FlexAttention with a block mask that is built
from the documents' borders (compiling a mask function over 16,384 tokens took the compiler over a minute). On
a CPU, and where heads are too small for FlexAttention, the pack is cut into its documents for the attention
alone (`cpu_attention`); everything else in the model runs on the packed tokens.
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
# FlexAttention's kernels support no smaller heads.
MIN_HEAD = 16
# Longer documents run in SDPA, which stores no probabilities: these grow with the square of the length.
MAX_BF16_LENGTH = 1024


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

    One function serves packs and padded rows, chosen by its arguments: the model keeps it, so that a
    checkpointed layer is recomputed in the backward pass with the attention of its forward pass.
    """
    from torch.nn.attention.flex_attention import BlockMask  # noqa: PLC0415 - takes seconds
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: PLC0415 - see transformers_lock

    if parts is not None:
        return _by_document(query, key, value, parts, **settings), None
    own = "flex_attention" if isinstance(attention_mask, BlockMask) else "sdpa"
    return ALL_ATTENTION_FUNCTIONS[own](module, query, key, value, attention_mask, **settings)


@torch.compiler.disable  # lengths differ in every pack, and each would be compiled again
def _by_document(  # noqa: PLR0913 - tensors and keywords, as transformers hands them
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
        ModelError: the architecture needs attention that packs do not support.
    """
    unsupported = [name for name in ("s_aux", "head_mask") if others.get(name) is not None]
    if softcap or dropout or unsupported:
        raise _no_packs()
    parts = parts.within(sliding_window)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    device = query.device.type
    reduced = query.dtype == torch.bfloat16 or torch.is_autocast_enabled(device)
    if reduced and max(parts.lengths) <= MAX_BF16_LENGTH:
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
        "Set pack_tokens to null: padded rows work for every model",
    )


def _install(model: nn.Module) -> None:
    """Install `_attend` as the model's attention; for padded rows it calls SDPA."""
    from transformers import AttentionInterface  # noqa: PLC0415 - see transformers_lock
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface  # noqa: PLC0415 - see transformers_lock

    config: Any = model.config
    if config._attn_implementation == NAME:
        return
    if config._attn_implementation != "sdpa":
        raise ModelError(
            f"the model uses {config._attn_implementation} attention, and packs need sdpa",
            "Set pack_tokens to null",
        )
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    config._attn_implementation = NAME


@contextmanager
def restore_attention_on_error(model: nn.Module) -> Iterator[None]:
    """Restore the model's own attention if the block raises an exception.

    Some models (Falcon) check the name of their attention, and omit their causal mask under another one.
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
    full: Any = model
    decoder = full.get_decoder() if hasattr(model, "get_decoder") else full.base_model
    # transformers does not find the trunk of some classes (Llama 4's text model), or returns their head
    # (ModernBERT).
    if decoder is full or isinstance(decoder, nn.Linear):
        decoder = full.base_model
    return getattr(full, "model", decoder) if decoder is full else decoder


def accepts(module: nn.Module, argument: str) -> bool:
    """Whether a module's forward pass has this argument; trunks with ALiBi or a state take no positions."""
    return argument in inspect.signature(getattr(module, "forward", module)).parameters


def padded_hidden(model: nn.Module, ids_BT: Tensor, attention_BT: Tensor) -> Tensor:
    """Last hidden states (B, T, H) of right-padded rows, without the output head."""
    trunk = trunk_of(model)
    inputs = {"input_ids": ids_BT, "attention_mask": attention_BT, "use_cache": False}
    if accepts(trunk, "position_ids"):
        inputs["position_ids"] = (attention_BT.cumsum(-1) - 1).clamp(min=0)
    return trunk(**inputs).last_hidden_state


def packed_hidden(model: nn.Module, pack: Pack, parts: DocumentParts | None = None) -> Tensor:
    """Last hidden states (T, H) of a pack, without the output head; `parts` avoids computing them again.

    Raises:
        ModelError: the architecture needs attention that packs do not support.
    """
    trunk = trunk_of(model)
    inputs: dict[str, Any] = {"input_ids": pack.ids_T[None], "position_ids": pack.positions_T[None]}
    if pack.ids_T.is_cuda and has_flex_heads(trunk.config) and not _exceeds_window(trunk.config, pack):
        inputs["attention_mask"] = block_mask(pack)
    else:
        inputs["parts"] = parts or DocumentParts.of(pack)
    _install(model)
    return trunk(**inputs, use_cache=False).last_hidden_state[0]


def has_flex_heads(config: Any) -> bool:
    """Whether heads are large enough for FlexAttention on a GPU; if not, documents attend one by one."""
    size = head_size(config) or config.hidden_size // config.num_attention_heads
    return size >= MIN_HEAD


def _exceeds_window(config: Any, pack: Pack) -> bool:
    """Whether a document is longer than some layer's window: one block mask serves all layers, so such packs
    attend document by document, where every layer has its own window."""
    window = getattr(config, "sliding_window", None)
    return bool(window and int(pack.positions_T.max()) >= window)


def block_mask(pack: Pack) -> Any:
    """FlexAttention's mask of a pack whose length is a multiple of 128, from the borders of its documents."""
    from torch.nn.attention.flex_attention import BlockMask  # noqa: PLC0415 - takes seconds

    document_T, branch_T = pack.document_T, pack.branch_T
    documents = document_T.cpu().numpy()

    def visible(_b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        same = document_T[q] == document_T[k]
        return same & (k <= q) & ((branch_T[k] == 0) | (branch_T[k] == branch_T[q]))

    partial_QK, full_QK = _blocks(documents, branch_T.cpu().numpy())

    def table(chosen_QK: np.ndarray) -> tuple[Tensor, Tensor]:
        counts = torch.from_numpy(chosen_QK.sum(1).astype(np.int32))
        # The chosen blocks first, in order; the rest is not read.
        indices = torch.from_numpy(np.argsort(~chosen_QK, axis=1, kind="stable").astype(np.int32))
        return counts[None, None].to(document_T.device), indices[None, None].to(document_T.device)

    partial, full = table(partial_QK), table(full_QK)
    return BlockMask.from_kv_blocks(*partial, *full, BLOCK_SIZE=BLOCK, mask_mod=visible)


def round_up_to_block(tokens: int) -> int:
    """The smallest multiple of FlexAttention's block size that holds these tokens."""
    return -(-tokens // BLOCK) * BLOCK


def _blocks(document_T: np.ndarray, branch_T: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(Q, K) blocks that are visible in part, and those that are fully visible."""
    if len(document_T) % BLOCK:
        raise ValueError(f"FlexAttention needs a multiple of {BLOCK} tokens, not {len(document_T)}")
    documents, branches = document_T.reshape(-1, BLOCK), branch_T.reshape(-1, BLOCK)
    low, high = documents.min(1), documents.max(1)
    below = np.tri(len(low), dtype=bool)
    # Documents are in order, so two blocks share one exactly if their ranges overlap.
    touching = below & (low[:, None] <= high[None, :]) & (low[None, :] <= high[:, None])
    same_document = ((low == high)[:, None] & (low == high)[None, :]) & (low[:, None] == low[None, :])
    uniform = (branches == branches[:, :1]).all(1)  # blocks with tokens of one branch only
    prompt = uniform & (branches[:, 0] == 0)
    same_branch = uniform[:, None] & uniform[None, :] & (branches[:, None, 0] == branches[None, :, 0])
    visible = same_document & (prompt[None, :] | same_branch)
    full = touching & visible & ~np.eye(len(low), dtype=bool)
    return touching & ~full, full
