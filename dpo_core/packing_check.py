"""Whether packs give an architecture the log-probs and gradients that padded rows give it.

Small differences count: with fresh weights all log-probs lie close together, and a state or a mask that leaks
from one document into the next moves them by little. So differences are compared with the spread of the
log-probs, on documents as long as those to be trained, and architectures that are known to keep a state from
token to token are not packed at all.

Shapes: S branches, L tokens of the longest, U different token ids, H hidden size.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dpo_core.attention import BLOCK, attention_on_trial, trunk_of, whole_blocks
from dpo_core.errors import ModelError
from dpo_core.head import head_of
from dpo_core.layout import Document, Layout, pack, pad
from dpo_core.scores import branch_scores

# What a difference may be, as a share of the spread of log-probs, and at least in nats: rounding in fp32.
_SHARE, _LEAST = 1e-3, {"cpu": 1e-5, "cuda": 2e-3}
_GRADIENT_SHARE = 2e-4
# Attention that sees earlier tokens of its own document by mask and position alone.
_MASKED_LAYERS = {"full_attention", "sliding_attention"}
# Operations that a trial may cost beside its shortest form: seconds on two cores.
_BUDGET = 1e12
_SHORT = 40


def packing_fault(model: nn.Module, longest: int, *, gradients: bool = False) -> str | None:
    """Why an architecture cannot be packed, in one sentence; None where it can.

    Args:
        longest: tokens of the longest document that will be packed. Very large models are tried on shorter
            ones, as long as a few seconds allow, or as their attention window asks for.
        gradients: compare the gradients in the token embeddings too.
    """
    state = _state_of(model)
    if state:
        return state
    documents = trial_documents(model, _affordable(model, longest))
    device = next(model.parameters()).device
    padded, packed = pad(documents).to(device), None
    tokens = sum(map(len, documents))
    packed = pack(documents, whole_blocks(tokens) if device.type == "cuda" else None).to(device)
    ours, ours_UH = _scores(model, padded, gradients)
    try:
        with attention_on_trial(model):
            theirs, theirs_UH = _scores(model, packed, gradients)
            gap, allowed = difference(ours, theirs)
            if not gap <= allowed:
                raise ModelError(
                    f"its log-probs from packs differ by {gap:.2g} nats from those of padded rows", ""
                )
            if ours_UH is not None and theirs_UH is not None:
                share = float((ours_UH - theirs_UH).norm() / ours_UH.norm().clamp(min=1e-30))
                if not share <= _GRADIENT_SHARE:
                    raise ModelError(
                        f"its gradients from packs differ by {share:.2%} from those of padded rows", ""
                    )
    except ModelError as error:
        return error.problem
    except (
        TypeError,
        AttributeError,
        RuntimeError,
        ValueError,
        IndexError,
        KeyError,
        AssertionError,
    ) as error:
        return f"its layers cannot run on packs ({type(error).__name__}: {str(error).splitlines()[0][:100]})"
    return None


def trial_documents(model: nn.Module, longest: int) -> list[Document]:
    """Two documents of two completions each, of random tokens; the first has `longest` tokens."""
    vocabulary = len(head_of(model)[0])
    ids = np.random.default_rng(0).permutation(np.arange(vocabulary))
    padding = getattr(model.config, "pad_token_id", None)
    ids = ids[ids != padding]  # some architectures embed it as nothing
    ids = np.resize(ids, longest + 2 * _SHORT).tolist()
    branches = (3, 5)
    prompts = max(longest - sum(branches) + len(branches), 2), 6
    documents, at = [], 0
    for prompt in prompts:
        parts = []
        for length in (prompt, *branches):
            parts.append(tuple(ids[at : at + length]))
            at += length
        documents.append(Document(parts[0], tuple(parts[1:])))
    return documents


def difference(ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    """The largest difference of two series of log-probs, and what rounding may make of it."""
    allowed = max(_LEAST[ours.device.type], _SHARE * float(ours.std()))
    return float((ours - theirs).abs().max()), allowed


def _scores(model: nn.Module, layout: Layout, gradients: bool) -> tuple[Tensor, Tensor | None]:
    """Log-probs of all branches (N,), and the gradient of a weighted sum of them by token id (U, H)."""
    if not gradients:
        with torch.no_grad():
            return branch_scores(model, layout).logps_SL[layout.place_N], None
    embedded: list[tuple[Tensor, Tensor]] = []

    def take_over(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        leaf = output.detach().requires_grad_()
        embedded.append((arguments[0], leaf))
        return leaf * 1  # some architectures write into their embeddings

    hook = model.get_input_embeddings().register_forward_hook(take_over)  # type: ignore[operator]
    frozen = [p for p in model.parameters() if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        with torch.enable_grad():
            logps = branch_scores(model, layout).logps_SL[layout.place_N]
            # Unequal weights, so that exchanged positions show.
            weights = torch.linspace(0.5, 2.0, len(logps), device=logps.device)
            by_input = torch.autograd.grad((logps * weights).sum(), [leaf for _, leaf in embedded])
    finally:
        hook.remove()
        for parameter in frozen:
            parameter.requires_grad_(True)
    total_UH: Tensor | None = None
    for (ids, _), gradient in zip(embedded, by_input, strict=True):
        size = int(max(int(i.max()) for i, _ in embedded)) + 1
        flat = gradient.reshape(-1, gradient.shape[-1]).float()
        part = flat.new_zeros(max(size, len(head_of(model)[0])), flat.shape[-1]).index_add(
            0, ids.flatten(), flat
        )
        total_UH = part if total_UH is None else total_UH + part
    return logps.detach(), total_UH


def _state_of(model: nn.Module) -> str | None:
    config: Any = trunk_of(model).config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    kinds = {str(kind) for kind in getattr(text, "layer_types", None) or ()} - _MASKED_LAYERS
    if kinds:
        return f"its {', '.join(sorted(kinds))} layers read more than a mask shows"
    if getattr(model, "_is_stateful", False):
        return "its layers keep a state from token to token"
    return None


def _affordable(model: nn.Module, longest: int) -> int:
    """Tokens of the longest document of a trial."""
    parameters = sum(p.numel() for p in model.parameters())
    cheap = int(_BUDGET / (8 * max(parameters, 1)))
    if next(model.parameters()).is_cuda:
        cheap *= 100
    window = getattr(trunk_of(model).config, "sliding_window", None) or 0
    # A window shows where a document reaches beyond it.
    wanted = window + _SHORT if 0 < window < longest else 0
    return max(min(longest, max(cheap, wanted, BLOCK)), 12)
