"""Checks that an architecture has the same log-probs and gradients in packs as in padded rows.

Small differences matter: with random weights all log-probs are close together, and a state or a mask that
leaks from one document into the next changes them only a little. So differences are compared with the spread
of the log-probs, on documents as long as those to be trained, and architectures that are known to carry a
state from token to token are never packed.

Shapes: S branches, L tokens of the longest, U different token ids, H hidden size.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dpo_core.errors import ModelError
from dpo_core.models.source import position_limit
from dpo_core.scoring.attention import restore_attention_on_error, round_up_to_block, trunk_of
from dpo_core.scoring.branch_scores import branch_scores
from dpo_core.scoring.document import Document
from dpo_core.scoring.layout import Layout, pack, pad
from dpo_core.scoring.lm_head import head_of

# Allowed difference as a share of the spread of log-probs, and at least in nats: rounding in fp32.
_TOLERANCE, _MIN_TOLERANCE = 1e-3, {"cpu": 1e-5, "cuda": 2e-3}
_GRADIENT_TOLERANCE = 2e-4
# Attention that is controlled by mask and position alone.
_MASKED_LAYERS = {"full_attention", "sliding_attention"}
# Weights times tokens of a trial with long documents: some seconds on two cores, or on a GPU.
_TRIAL_OPERATIONS = {"cpu": 1e11, "cuda": 1e13}
_SHORT = 64
# Attribute of a model with what its trials found, by what they depend on.
_TRIED = "_dpo_trials"
# Positions that a trial may use after the longest document.
_SPARE_POSITIONS = 5
# Exceptions of architectures that cannot run a trial.
RAW_ERRORS = (
    TypeError,
    AttributeError,
    RuntimeError,
    ValueError,
    IndexError,
    KeyError,
    AssertionError,
    NotImplementedError,
)


def trials_of(model: nn.Module) -> dict[Any, Any]:
    """What trials of a model have found, by what they depend on."""
    found: dict[Any, Any] = vars(model).setdefault(_TRIED, {})
    return found


def share_trials(model: nn.Module, trials: dict[str, dict[Any, Any]]) -> None:
    """Try checkpoints of one architecture and configuration once, as those of one base model are.

    Args:
        trials: those of the checkpoints before, which must be on the same device; the model's are added.
    """
    config: Any = model.config
    fields = {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}
    setattr(model, _TRIED, trials.setdefault(f"{type(model).__qualname__} {fields}", {}))


def packing_fault(model: nn.Module, longest: int, *, thorough: bool = False) -> str | None:
    """Why an architecture cannot be packed, in one sentence; None if it can. Tried once for each model.

    Args:
        longest: tokens of the longest document that will be packed.
        thorough: try documents of that length, within some seconds, and compare gradients too. A short trial
            is enough where a thorough one of the same architecture has passed.
    """
    state = _state_of(model)
    if state:
        return state
    short = _trial_length(model, longest)
    tried = trials_of(model)
    key = short, thorough and longest, next(model.parameters()).device
    if key not in tried:
        tried[key] = _trial_fault(model, short, longest if thorough else None)
    fault: str | None = tried[key]
    return fault


def _trial_fault(model: nn.Module, short: int, thorough: int | None) -> str | None:
    """What trial documents of `short` tokens show; a thorough trial has the length of its longest ones."""
    try:
        with restore_attention_on_error(model):
            _compare(model, short, gradients=thorough is not None)
            if thorough and (long := min(thorough, _affordable_length(model))) > short:
                _compare(model, long, gradients=False)
    except ModelError as error:
        return error.problem
    except RAW_ERRORS as error:
        return f"its layers cannot run on packs ({type(error).__name__}: {first_line(error)})"
    return None


def _compare(model: nn.Module, longest: int, *, gradients: bool) -> None:
    """Raise ModelError if packs and padded rows of trial documents differ."""
    documents = trial_documents(model, longest)
    device = next(model.parameters()).device
    width = round_up_to_block(sum(map(len, documents))) if device.type == "cuda" else None
    # One document per call: padded to a long one, a short one would take as long.
    rows = [_scores(model, pad([document]).to(device), gradients) for document in documents]
    packed, packed_UH = _scores(model, pack(documents, width).to(device), gradients)
    gap, allowed = difference(torch.cat([logps for logps, _ in rows]), packed)
    if not gap <= allowed:
        raise ModelError(f"its log-probs from packs differ by {gap:.2g} nats from those of padded rows", "")
    if gradients:
        rows_UH = sum(gradient_UH for _, gradient_UH in rows)
        share = float((rows_UH - packed_UH).norm() / packed_UH.norm().clamp(min=1e-30))
        if not share <= _GRADIENT_TOLERANCE:
            raise ModelError(f"its gradients from packs differ by {share:.2%} from those of padded rows", "")


def trial_documents(model: nn.Module, longest: int) -> list[Document]:
    """Two documents of random tokens with two completions each; the first has `longest` tokens, or as many as
    the model has positions for."""
    limit = position_limit(model.config)
    longest = min(longest, limit - _SPARE_POSITIONS) if limit is not None else longest
    vocabulary = len(head_of(model)[0])
    ids = np.random.default_rng(0).permutation(np.arange(vocabulary))
    padding = getattr(model.config, "pad_token_id", None)
    ids = ids[ids != padding]  # some architectures embed it as zeros
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
    """The largest difference of two series of log-probs, and the largest that rounding explains."""
    allowed = max(_MIN_TOLERANCE[ours.device.type], _TOLERANCE * float(ours.std()))
    return float((ours - theirs).abs().max()), allowed


def _scores(model: nn.Module, layout: Layout, gradients: bool) -> tuple[Tensor, Tensor]:
    """Log-probs of all branches (N,), and the gradient of their weighted sum by token (U, H), or nothing."""
    if not gradients:
        with torch.no_grad():
            return branch_scores(model, layout).logps_SL[layout.index_N], torch.empty(0)
    embedded: list[tuple[Tensor, Tensor]] = []

    def take_over(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        leaf = output.detach().requires_grad_()
        embedded.append((arguments[0], leaf))
        return leaf * 1  # some architectures write into their embeddings

    hook = model.get_input_embeddings().register_forward_hook(take_over)  # type: ignore[operator]
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        with torch.enable_grad():
            logps = branch_scores(model, layout).logps_SL[layout.index_N]
            # Weighted by token, so that exchanged positions are detected.
            weights = 0.5 + layout.targets_N / len(head_of(model)[0])
            by_input = torch.autograd.grad((logps * weights).sum(), [leaf for _, leaf in embedded])
    finally:
        hook.remove()
        for parameter in trained:
            parameter.requires_grad_(True)
    rows = len(head_of(model)[0])
    sums_UH = [
        gradient.new_zeros(rows, gradient.shape[-1]).index_add(0, ids.flatten(), gradient.flatten(0, -2))
        for (ids, _), gradient in zip(embedded, by_input, strict=True)
    ]
    return logps.detach(), torch.stack(sums_UH).sum(0)


def _state_of(model: nn.Module) -> str | None:
    config: Any = trunk_of(model).config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    kinds = {str(kind) for kind in getattr(text, "layer_types", None) or ()} - _MASKED_LAYERS
    if kinds:
        return f"its {', '.join(sorted(kinds))} layers read earlier documents in spite of the attention mask"
    if getattr(model, "_is_stateful", False):
        return "its layers carry a state from token to token"
    return None


def _trial_length(model: nn.Module, longest: int) -> int:
    """Tokens of the longest document of a short trial: longer than a window if documents are."""
    window = getattr(trunk_of(model).config, "sliding_window", None) or 0
    return max(min(longest, max(_SHORT, window + _SHORT if window < longest else 0)), 12)


def _affordable_length(model: nn.Module) -> int:
    """Tokens of the longest document that a trial can afford: a third of what it reads in some seconds."""
    parameters = sum(p.numel() for p in model.parameters())
    return int(_TRIAL_OPERATIONS[next(model.parameters()).device.type] / max(parameters, 1))


def first_line(error: Exception) -> str:
    """The first 120 characters of an error's first line."""
    return (str(error).splitlines() or [""])[0][:120]
