"""The auxiliary load-balancing loss of mixtures of experts, for models whose config sets it.

The architecture's own function in transformers computes it (Fedus et al. 2021, arXiv 2101.03961, equations 4
to 6) on every real token of a forward pass: padding is left out, and a prompt in a pack counts once. PPO,
GRPO and online DPO train without it.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dpo_core.models.reward_model import RewardModel
from dpo_core.scoring.attention import trunk_of

log = logging.getLogger("dpo")


class RouterBalance:
    """Records a model's router logits while a loss is computed, and computes the auxiliary loss from them.

    Args:
        coefficient: the config's `router_aux_loss_coef`.
        loss_function: the architecture's `load_balancing_loss_func`.
        top_k: experts that each token uses.
    """

    def __init__(self, trunk: nn.Module, coefficient: float, loss_function: Any, top_k: int) -> None:
        self.coefficient, self.loss_function, self.top_k = coefficient, loss_function, top_k
        self.real_T: Tensor | None = None
        """Which tokens of the next pack are not padding."""
        self._passes: list[tuple[tuple[Tensor, ...], Tensor]] | None = None
        trunk.register_forward_hook(self._record, with_kwargs=True)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the router logits of forward passes with gradient."""
        self._passes = []
        try:
            yield
        finally:
            self._passes = None

    def _record(self, _module: nn.Module, _args: Any, inputs: dict[str, Any], output: Any) -> None:
        if self._passes is None or not torch.is_grad_enabled():
            return
        layers = tuple(logits.flatten(0, -2) for logits in output.router_logits)
        mask = inputs.get("attention_mask")
        if not isinstance(mask, Tensor):  # the forward pass is of a pack
            mask = self.real_T
        real_T = torch.ones(len(layers[0]), device=layers[0].device) if mask is None else mask.flatten()
        self._passes.append((layers, real_T))

    def loss(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The auxiliary loss of the recorded passes, without its coefficient, and the load of the experts.

        The load of an expert is its share of the tokens' choices times the number of experts: 1 if all are
        used equally. Reported are the most and the least used expert, averaged over the layers.
        """
        assert self._passes
        layers = tuple(map(torch.cat, zip(*(layers for layers, _ in self._passes), strict=True)))
        real_T = torch.cat([real_T for _, real_T in self._passes])
        experts = layers[0].shape[-1]
        loss: Tensor = self.loss_function(layers, experts, self.top_k, real_T[None])
        with torch.no_grad():
            loads = torch.stack([self._load(logits, real_T.bool()) for logits in layers])
        return loss, {
            "router/aux_loss": loss.detach(),
            "router/most_used": loads.max(-1).values.mean(),
            "router/least_used": loads.min(-1).values.mean(),
        }

    def _load(self, logits_TE: Tensor, real_T: Tensor) -> Tensor:
        experts = logits_TE.shape[-1]
        chosen = logits_TE[real_T].float().topk(self.top_k, -1).indices.flatten()
        return torch.bincount(chosen, minlength=experts).float() * experts / len(chosen)


def router_balance(module: nn.Module) -> RouterBalance | None:
    """The auxiliary loss of a model's training; None if its config does not set it.

    As in transformers it is set if `output_router_logits` is true and `router_aux_loss_coef` is above 0.
    """
    trunk: Any = module.backbone if isinstance(module, RewardModel) else trunk_of(module)
    config = trunk.config.get_text_config()
    if not getattr(config, "output_router_logits", False):
        return None
    coefficient = float(getattr(config, "router_aux_loss_coef", 0) or 0)
    function = getattr(sys.modules[type(trunk).__module__], "load_balancing_loss_func", None)
    top_k = getattr(config, "num_experts_per_tok", None)
    if coefficient == 0:
        return None
    if function is None or top_k is None or not _gives_logits(trunk):
        log.warning(
            "the config of %s sets router_aux_loss_coef to %g, but transformers has no auxiliary loss for "
            "this architecture: it is trained without one",
            type(module).__name__,
            coefficient,
        )
        return None
    return RouterBalance(trunk, coefficient, function, int(top_k))


@torch.no_grad()
def _gives_logits(trunk: Any) -> bool:
    ids_11 = torch.zeros(1, 1, dtype=torch.long, device=next(trunk.parameters()).device)
    return bool(getattr(trunk(input_ids=ids_11, use_cache=False), "router_logits", None))
