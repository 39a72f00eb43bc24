"""The output head: log-probs of target tokens from last hidden states, in fp32 and in chunks of tokens.

The head's product and its softmax are fp32 whatever the trunk's autocast: bf16 logits cost about 0.2 nats
over a thousand tokens. Gradients need less precision, so under bf16 autocast the two products of the backward
pass, two thirds of the head's work, use bf16 matrices as in every other layer.

Shapes: N scored tokens, C tokens of a chunk, H hidden size, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dpo_core.data.tokens.image_codes import image_codes
from dpo_core.scoring.flops import keeps_logits

# fp32 logits of one chunk: 512 x 49,152 x 4 bytes is 100 MB.
CHUNK_TOKENS = 512


def head_of(model: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight (V, H) and bias (V,) fp32 of a model's output head, for a model of images those of its codes."""
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    bias = head.bias.float() if getattr(head, "bias", None) is not None else None
    if images := image_codes(model.config):
        return head.weight[: images.count], None if bias is None else bias[: images.count]
    return head.weight, bias


def own_logits(model: nn.Module, logits: Tensor) -> Tensor:
    """A model's own logits (…, V), of a model of images those of its codes."""
    images = image_codes(model.config)
    return logits[..., : images.count] if images else logits


def softcap_of(model: nn.Module) -> float | None:
    """The bound that some models (Gemma 2, RecurrentGemma, xLSTM) put on their logits."""
    return _field(model, "final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def scale_of(model: nn.Module) -> float:
    """The factor of the head's product (Cohere, Falcon-H1), or the inverse of its divisor (Granite)."""
    divisor = _field(model, "logits_scaling")
    if divisor and str(getattr(model.config, "model_type", "")).startswith("hyperclovax"):
        return divisor  # a multiplier with Granite's name for a divisor
    factor = _field(model, "logit_scale", "lm_head_multiplier", "output_multiplier")
    return 1 / divisor if divisor else factor or 1.0


def _field(model: nn.Module, *names: str) -> float | None:
    text: Any = getattr(model.config, "get_text_config", lambda: model.config)()
    return next((value for name in names if (value := getattr(text, name, None)) is not None), None)


def logits(model: nn.Module, hidden_CH: Tensor) -> Tensor:
    """(C, V) fp32, differentiable."""
    softcap, scale = softcap_of(model), scale_of(model)
    with torch.autocast(hidden_CH.device.type, enabled=False):
        weight_VH, bias_V = head_of(model)
        logits_CV = F.linear(hidden_CH.float(), weight_VH.float(), bias_V)
        logits_CV = logits_CV if scale == 1 else logits_CV * scale
    return torch.tanh(logits_CV / softcap) * softcap if softcap else logits_CV


def target_logps(model: nn.Module, hidden_NH: Tensor, targets_N: Tensor, temperature: float = 1.0) -> Tensor:
    """log π(target) (N,) fp32, differentiable, of a model without soft-capped logits."""
    weight_VH, bias_V = head_of(model)
    keep = torch.is_grad_enabled() and keeps_logits(len(targets_N), len(weight_VH))
    device = hidden_NH.device.type
    products = torch.bfloat16 if torch.is_autocast_enabled(device) else torch.float32
    with torch.autocast(device, enabled=False):
        scale = scale_of(model) / temperature
        arguments = hidden_NH.float(), weight_VH, bias_V, targets_N, scale, products, keep
        return _TargetLogps.apply(*arguments)


class _TargetLogps(torch.autograd.Function):
    """Stores p - 1{target} (C, V) of each chunk, the gradient of -log π(target) by its logits."""

    @staticmethod
    def forward(  # noqa: PLR0913 - tensors, as torch.autograd.Function hands them
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        scale: float,
        products: torch.dtype,
        keep: bool,
    ) -> Tensor:
        ctx.scale, ctx.products = scale, products
        logps, d_logits = [], []
        for hidden_CH, targets_C in zip(
            *(t.split(CHUNK_TOKENS) for t in (hidden_NH, targets_N)), strict=True
        ):
            logps_CV = _log_softmax(hidden_CH, weight_VH, bias_V, scale)
            logps.append(logps_CV.gather(-1, targets_C[:, None])[:, 0])
            if keep:
                d_logits.append(_gradient(logps_CV, targets_C, products))
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V, targets_N, *d_logits)
        return torch.cat(logps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden_NH, weight_VH, bias_V, targets_N, *d_logits = ctx.saved_tensors
        scale, products = ctx.scale, ctx.products
        # Rows are scaled outside the products: (N, H) numbers are fewer than (N, V).
        rows_N1 = gradients[0][:, None] * -scale
        scaled_NH = (hidden_NH * rows_N1).to(products)
        multiplied_VH = weight_VH.to(products)
        d_hidden_NH = torch.empty_like(hidden_NH)
        d_weight_VH = torch.zeros_like(weight_VH, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        d_bias_V = torch.zeros_like(bias_V) if ctx.needs_input_grad[2] else None
        for number, start in enumerate(range(0, len(targets_N), CHUNK_TOKENS)):
            part = slice(start, start + CHUNK_TOKENS)
            if d_logits:
                d_logits_CV = d_logits[number]
            else:
                logps_CV = _log_softmax(hidden_NH[part], weight_VH, bias_V, scale)
                d_logits_CV = _gradient(logps_CV, targets_N[part], products)
            d_hidden_NH[part] = (d_logits_CV @ multiplied_VH) * rows_N1[part]
            if d_weight_VH is not None:
                d_weight_VH += d_logits_CV.T @ scaled_NH[part]
            if d_bias_V is not None:
                d_bias_V += (d_logits_CV * rows_N1[part]).sum(0)
        return d_hidden_NH, d_weight_VH, d_bias_V, None, None, None, None


def _log_softmax(hidden_CH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, scale: float) -> Tensor:
    logits_CV = F.linear(hidden_CH, weight_VH.float(), bias_V)
    return torch.log_softmax(logits_CV if scale == 1 else logits_CV * scale, -1)


def _gradient(logps_CV: Tensor, targets_C: Tensor, dtype: torch.dtype) -> Tensor:
    """p - 1{target} (C, V), at the target from the exact log-prob; overwrites `logps_CV`."""
    at_target_C1 = torch.expm1(logps_CV.gather(-1, targets_C[:, None]))
    return logps_CV.exp_().to(dtype).scatter_(1, targets_C[:, None], at_target_C1.to(dtype))
