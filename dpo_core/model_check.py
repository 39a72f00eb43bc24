"""Checks before training whether a model can be trained in packs, only in padded rows, or not at all.

Every assumption about an architecture is tested on the model itself, in a few small forward passes: trunk and
head give the model's own output, no token reads a later one, padding changes nothing, two passes in training
mode agree, packs give the results of padded rows, also in the precision of training.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dpo_core.errors import ModelError
from dpo_core.generation.next_token import cache_is_exact
from dpo_core.models.config import ModelConfig
from dpo_core.models.dropout import disable_dropout, set_training
from dpo_core.models.load import load_model, read_config
from dpo_core.models.source import check_source_context, locate, position_limit
from dpo_core.scoring.attention import restore_attention_on_error, round_up_to_block
from dpo_core.scoring.autocast import autocast, effective_precision
from dpo_core.scoring.branch_scores import branch_scores
from dpo_core.scoring.document import Document
from dpo_core.scoring.layout import pack, pad
from dpo_core.scoring.lm_head import own_logits
from dpo_core.scoring.packing_check import RAW_ERRORS, difference, first_line, packing_fault, trial_documents
from dpo_core.scoring.precision import Precision

REMEDY = "Use a causal language model of another architecture, such as Llama, Qwen, Mistral, Gemma or OLMo"


_SHORT = 24


@dataclass(frozen=True)
class ModelCheck:
    """How a model is trained, or why it cannot be."""

    layout: Literal["packed", "padded", "refused"]
    reason: str
    """One sentence."""
    sampling: Literal["cached", "whole rows", "none"] = "none"
    """How the next token is computed: with the cache, or from complete rows if the cache is not exact."""

    def require(self) -> None:
        """Raise ModelError if the model is refused."""
        if self.layout == "refused":
            raise ModelError(f"the model cannot be aligned: {self.reason}", REMEDY)


def check_named(
    config: ModelConfig, *, precision: Precision = "bf16", longest: int | None = None
) -> ModelCheck:
    """`check_model` of the model of a recipe; a model that cannot be found or loaded is refused.

    Args:
        longest: as in `check_model`; by default 512, or the model's position limit if that is less.
    """
    try:
        source = locate(config)
        if longest is None:
            longest = min(512, position_limit(read_config(config)) or 512)
        check_source_context(source, longest)
        if config.scratch is not None:  # with random weights: the import job makes the final ones
            return check_model(_initialised(config), precision=precision, longest=longest)
    except ModelError as error:
        return ModelCheck("refused", f"{error.problem}. {error.remedy}")
    return check_folder(source, precision=precision, longest=longest)


def _initialised(config: ModelConfig) -> nn.Module:
    from transformers import AutoModelForCausalLM  # noqa: PLC0415 - see transformers_lock

    model: nn.Module = AutoModelForCausalLM.from_config(read_config(config), dtype=torch.float32)
    return model


def check_folder(folder: Path, *, precision: Precision = "bf16", longest: int = 512) -> ModelCheck:
    """`check_model` of a checkpoint folder or .gguf file; a model that cannot be loaded is refused."""
    try:
        model = load_model(folder)
    except ModelError as error:
        return ModelCheck("refused", f"{error.problem}. {error.remedy}")
    return check_model(model, precision=precision, longest=longest)


def check_model(model: nn.Module, *, precision: Precision = "bf16", longest: int = 512) -> ModelCheck:
    """Test all assumptions of training, sampling and evaluation.

    The model is left in eval mode with its dropout disabled.

    Args:
        precision: precision of training.
        longest: tokens of the longest document to train on (`tokens.max_length`).
    """
    disable_dropout(model)
    model.eval()
    fault = definition_fault(model)
    if fault:
        return ModelCheck("refused", fault)
    sampling: Literal["cached", "whole rows"] = "cached" if cache_is_exact(model) else "whole rows"
    why = packing_fault(model, longest, thorough=True) or _reduced_fault(model, precision)
    if why:
        return ModelCheck("padded", why, sampling)
    return ModelCheck("packed", "packs give the log-probs and gradients of padded rows", sampling)


def check_definition(model: nn.Module) -> None:
    """Raise ModelError if a model's log-probs cannot be computed from its trunk and head; see
    `definition_fault`."""
    fault = definition_fault(model)
    if fault:
        ModelCheck("refused", fault).require()


@torch.no_grad()
def definition_fault(model: nn.Module) -> str | None:
    """Why a model's log-probs cannot be computed from its trunk and head, or cannot be trained; else None.

    The model is left in eval mode, with its own attention implementation.
    """
    try:
        return _fault(model)
    except ModelError as error:
        return error.problem
    except RAW_ERRORS as error:
        raised = f"{type(error).__name__}: {first_line(error)}"
        return f"its layers do not run as a trunk with an output head ({raised})"
    finally:
        model.eval()


def _fault(model: nn.Module) -> str | None:
    documents = trial_documents(model, _SHORT)
    together = _logps(model, documents)
    spread_allowed = difference(together, together)[1]
    if not torch.isfinite(together).all():
        return "its log-probs are not finite"
    own = torch.cat([_own_logps(model, document) for document in documents])
    gap = float((together - own).abs().max())
    if not gap <= spread_allowed:
        causal = _reads_ahead(model, documents[0])
        return causal or (
            f"its output is not its trunk with a linear head (log-probs differ by {gap:.2g} nats): it "
            "scales, shifts or bounds its logits in an unknown way, or reads padding"
        )
    ahead = _reads_ahead(model, documents[0])
    if ahead:
        return ahead
    set_training(model)
    first, second = (_logps(model, documents) for _ in range(2))
    gap = float(torch.stack([first - second, first - together]).abs().max())
    if not gap <= spread_allowed:
        return (
            f"two passes in training mode differ by {gap:.2g} nats: it adds noise that cannot be switched off"
        )
    return None


def _logps(model: nn.Module, documents: list[Document]) -> Tensor:
    """Log-probs (N,) of all branches of all documents, in one pass of padded rows."""
    layout = pad(documents).to(next(model.parameters()).device)
    return branch_scores(model, layout).logps_SL[layout.index_N]


def _own_logps(model: Any, document: Document) -> Tensor:
    """Log-probs (N,) of a document's branches from the model's own output, one row at a time."""
    logps = []
    for branch in document.branches:
        ids = torch.tensor([document.prompt + branch], device=next(model.parameters()).device)
        logps_TV = torch.log_softmax(own_logits(model, model(input_ids=ids).logits[0]).float(), -1)
        at = torch.arange(len(document.prompt) - 1, ids.shape[1] - 1)
        logps.append(logps_TV[at, ids[0, at + 1]])
    return torch.cat(logps)


def _reads_ahead(model: Any, document: Document) -> str | None:
    """The fault of a model whose log-probs depend on later tokens, else None."""
    ids = torch.tensor([document.prompt], device=next(model.parameters()).device)
    complete = torch.log_softmax(model(input_ids=ids).logits[0].float(), -1)
    half = torch.log_softmax(model(input_ids=ids[:, : ids.shape[1] // 2]).logits[0].float(), -1)
    gap, allowed = difference(complete[: len(half)], half)
    if not gap <= allowed:
        return f"it is bidirectional: log-probs change by {gap:.2g} nats with the tokens that follow"
    return None


def _reduced_fault(model: nn.Module, precision: Precision) -> str | None:
    """The fault of a model whose packs in bf16 are much further from fp32 than its padded rows; else None."""
    device = next(model.parameters()).device
    if effective_precision(precision, device) == "fp32":
        return None
    documents = trial_documents(model, _SHORT)
    tokens = sum(map(len, documents))
    layouts = pad(documents), pack(documents, round_up_to_block(tokens) if device.type == "cuda" else None)
    try:
        with torch.no_grad(), restore_attention_on_error(model):
            exact = _logps(model, documents)
            with autocast(precision, device):
                padded, packed = (branch_scores(model, layout.to(device)).logps_SL for layout in layouts)
            index_N = layouts[0].to(device).index_N
            noise, gap = (float((logps[index_N] - exact).abs().mean()) for logps in (padded, packed))
            if not gap <= 4 * noise + difference(exact, exact)[1]:
                raise ModelError(
                    f"in {precision} its log-probs in packs are {gap:.2g} nats from those in fp32, and in "
                    f"padded rows only {noise:.2g}",
                    "",
                )
    except ModelError as error:
        return error.problem
    except RAW_ERRORS as error:
        return f"its layers cannot run on packs in {precision} ({type(error).__name__}: {first_line(error)})"
    return None
