"""Disables dropout and other noise in training: policy and reference must compute the same function.

Architectures name their dropout and layer drop in many ways, and some read the rate from the config in every
forward pass. So all rates that can be found are set to zero, and all modules run in eval mode, except layers
that are recomputed in the backward pass, for which transformers requires training mode. Router jitter is off
in eval mode, and its size is left alone: PhiMoE routes by it in eval mode too. `model_check` compares two
forward passes.
"""

import re
from typing import Any

from torch import nn

_NOISE = re.compile("drop")


def disable_dropout(model: nn.Module) -> None:
    """Set every rate of dropout and layer drop to zero, in modules and configs."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        _zero_rates(module)
    for config in {
        id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None
    }.values():
        _zero_rates(config)


def _zero_rates(holder: Any) -> None:
    for name, value in list(vars(holder).items()):
        # Where this is a module (Falcon's attention_dropout), its rate is `p`, set above.
        if isinstance(value, float) and value and _NOISE.search(name):
            setattr(holder, name, 0.0)


def set_training(model: nn.Module) -> None:
    """Make a model ready for a training step: eval mode, gradient checkpointing where it is switched on."""
    model.eval()
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True
