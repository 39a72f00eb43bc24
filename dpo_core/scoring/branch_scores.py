"""Scores of completions under a model, as objectives read them: token log-probs, KL, entropy, sharpness.

One function for padded rows and for packs: only the trunk's forward differs. The output head (see `lm_head`)
runs in chunks of tokens, over scored positions only; large batches recompute each chunk in the backward pass.

Shapes: S branches, L tokens of the longest, D documents, N scored tokens, C tokens of a chunk, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dpo_core.scoring import lm_head as head
from dpo_core.scoring.attention import packed_hidden, padded_hidden
from dpo_core.scoring.flops import keeps_logits
from dpo_core.scoring.layout import Layout, Pack, PaddedRows
from dpo_core.scoring.lm_head import head_of, logits, softcap_of, target_logps


@dataclass(frozen=True)
class BranchScores:
    """Scores of every branch, 0 after its end."""

    logps_SL: Tensor
    """log π(token | prompt and all tokens before it), fp32."""
    lengths_S: Tensor
    kl_SL: Tensor | None = None
    """KL(reference ‖ policy) of the next-token distributions at each position, over the whole vocabulary."""
    ref_logps_SL: Tensor | None = None
    """Log-probs under the live reference, if there is one."""
    sharpness_SL: Tensor | None = None
    """log π(token) - log Σ_v π(v)², detached."""
    entropy_SL: Tensor | None = None
    """-Σ_v π(v) log π(v) at each position, detached."""
    prompt_D: Tensor | None = None
    """Summed log-prob of the prompt's tokens from the second on; 0 for a prompt of one token."""


def hidden_of(model: nn.Module, layout: Layout) -> Tensor:
    """Last hidden states of all rows end to end, (tokens, H)."""
    if isinstance(layout, Pack):
        return packed_hidden(model, layout)
    assert isinstance(layout, PaddedRows)
    return padded_hidden(model, layout.ids_ST, layout.attention_ST).flatten(0, 1)


def branch_scores(
    model: nn.Module,
    layout: Layout,
    *,
    reference: nn.Module | None = None,
    sharpness: bool = False,
    prompts: bool = False,
    kl: bool = False,
    entropy: bool = False,
) -> BranchScores:
    """Scores of every branch under `model`, differentiable in its weights.

    Args:
        reference: a live reference, run without gradient; needed for `kl`.
    """
    hidden = hidden_of(model, layout)
    ref_hidden_NH = None
    if reference is not None:
        with torch.no_grad():
            ref_hidden_NH = hidden_of(reference, layout)[layout.predicts_N]
    columns = token_scores(
        model,
        hidden[layout.predicts_N],
        layout.targets_N,
        reference=reference,
        ref_hidden_NH=ref_hidden_NH,
        kl=kl,
        sharpness=sharpness,
        entropy=entropy,
    )
    tables = {f"{name}_SL": layout.table(values_N) for name, values_N in columns.items()}
    prompt_D = None
    if prompts:
        logps_M = token_scores(model, hidden[layout.prompt_predicts_M], layout.prompt_targets_M)["logps"]
        prompt_D = logps_M.new_zeros(len(layout.prompt_lengths_D))
        prompt_D = prompt_D.index_add(0, layout.prompt_document_M, logps_M)
    return BranchScores(**tables, lengths_S=layout.lengths_S, prompt_D=prompt_D)


def token_scores(  # noqa: PLR0913 - tensors
    model: nn.Module,
    hidden_NH: Tensor,
    targets_N: Tensor,
    *,
    temperature: float = 1.0,
    reference: nn.Module | None = None,
    ref_hidden_NH: Tensor | None = None,
    kl: bool = False,
    sharpness: bool = False,
    entropy: bool = False,
) -> dict[str, Tensor]:
    """`logps` of the targets and, if requested, `ref_logps`, `kl`, `sharpness`, `entropy`: (N,) fp32."""
    if reference is None and not sharpness and not entropy and not softcap_of(model):
        return {"logps": target_logps(model, hidden_NH, targets_N, temperature)}

    def chunk(hidden_CH: Tensor, targets_C: Tensor, ref_CH: Tensor | None) -> tuple[Tensor, ...]:
        logits_CV = logits(model, hidden_CH)
        logps_CV = torch.log_softmax(logits_CV / temperature if temperature != 1 else logits_CV, -1)
        columns = [logps_CV.gather(-1, targets_C[:, None])[:, 0]]
        if reference is not None:
            assert ref_CH is not None
            with torch.no_grad():
                ref_logps_CV = torch.log_softmax(logits(reference, ref_CH), -1)
                columns.append(ref_logps_CV.gather(-1, targets_C[:, None])[:, 0])
            if kl:
                ref_CV = ref_logps_CV.exp()
                # 0·log 0 is 0: a token of probability 0 under the reference would give 0·∞.
                columns.append((ref_CV * (ref_logps_CV - logps_CV).masked_fill(ref_CV == 0, 0.0)).sum(-1))
        if sharpness:
            with torch.no_grad():
                columns.append(columns[0].detach() - torch.logsumexp(2 * logps_CV.detach(), -1))
        if entropy:
            with torch.no_grad():
                p_CV = logps_CV.detach().exp()
                columns.append(-(p_CV * logps_CV.detach().masked_fill(p_CV == 0, 0.0)).sum(-1))
        return tuple(columns)

    names = ["logps"]
    names += ["ref_logps"] if reference is not None else []
    names += ["kl"] if kl and reference is not None else []
    names += ["sharpness"] if sharpness else []
    names += ["entropy"] if entropy else []
    if not len(targets_N):
        return dict.fromkeys(names, hidden_NH.new_zeros(0, dtype=torch.float32))
    recompute = torch.is_grad_enabled() and not keeps_logits(len(targets_N), len(head_of(model)[0]))
    pieces: list[tuple[Tensor, ...]] = []
    for start in range(0, len(targets_N), head.CHUNK_TOKENS):
        part = slice(start, start + head.CHUNK_TOKENS)
        ref_CH = None if ref_hidden_NH is None else ref_hidden_NH[part]
        inputs = hidden_NH[part], targets_N[part], ref_CH
        pieces.append(checkpoint(chunk, *inputs, use_reentrant=False) if recompute else chunk(*inputs))
    return dict(zip(names, map(torch.cat, zip(*pieces, strict=True)), strict=True))
