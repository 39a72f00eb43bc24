"""Autocast to bf16 over fp32 weights; fp32 on processors without bf16 arithmetic."""

import logging
import platform
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch

from dpo_core.scoring.precision import Precision

log = logging.getLogger("dpo")


def autocast(precision: Precision, device: torch.device | str = "cpu") -> AbstractContextManager[Any]:
    """bf16 autocast over fp32 weights; a null context for fp32."""
    if effective_precision(precision, device) == "fp32":
        return nullcontext()
    return torch.autocast(torch.device(device).type, torch.bfloat16)


def effective_precision(precision: Precision, device: torch.device | str = "cpu") -> Precision:
    """The precision of the computation: fp32 instead of bf16 if the processor has no bf16 arithmetic."""
    if precision == "bf16" and torch.device(device).type == "cpu" and not _processor_has_bf16():
        return "fp32"
    return precision


@cache
def _processor_has_bf16() -> bool:
    """False on x86 without AVX-512, where PyTorch's bf16 products are 3 to 80 times slower than fp32."""
    if platform.machine() not in ("x86_64", "AMD64") or "AVX512" in torch.backends.cpu.get_cpu_capability():
        return True
    log.warning("this processor has no bf16 arithmetic: bf16 settings are computed in fp32")
    return False
