"""Logits of the next token of growing rows: from a cache where the architecture's cache is exact, else anew.

Attention caches keys and values; state spaces and hybrids keep other things, each in its own way. Whether the
cache that transformers offers gives what the trainer computes is tried once a model; where it does not, whole
rows are read again for every token, which is slow and right.

Shapes: B rows, T tokens so far, V vocabulary.
"""

import logging
from collections.abc import Sequence as Seq
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dpo_core.scoring.attention import accepts, padded_hidden, trunk_of
from dpo_core.scoring.layout import right_padded
from dpo_core.scoring.lm_head import logits
from dpo_core.scoring.packing_check import RAW_ERRORS, difference, trial_documents

log = logging.getLogger(__name__)
_EXACT = "_cache_is_exact"


class Rows(Protocol):
    """Rows of tokens that grow together."""

    def logits(self) -> Tensor:
        """(B, V) of the token after each row."""
        ...

    def extend(self, next_B: Tensor) -> None:
        """Put a token at the end of each row."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone."""
        ...


def open_rows(model: nn.Module, prompts: Seq[tuple[int, ...]]) -> Rows:
    """Rows that begin as prompts, read by a cache where that is exact."""
    return CachedRows(model, prompts) if cache_is_exact(model) else WholeRows(model, prompts)


class CachedRows:
    """Rows of which only the new tokens are read; padded on the left, so that all end together."""

    def __init__(self, model: Any, prompts: Seq[tuple[int, ...]]) -> None:
        from transformers import DynamicCache

        self.model, self.cache = model, DynamicCache(config=model.config)
        self.device = next(model.parameters()).device
        flipped_BT, attention_BT = right_padded([tuple(reversed(prompt)) for prompt in prompts])
        self.new_BT = flipped_BT.flip(-1).to(self.device)
        self.attention_BT = attention_BT.flip(-1).to(self.device)
        # A state cannot be cut: rows that have ended are then fed on, and not looked at.
        stateful = getattr(model, "_is_stateful", False)
        self.can_cut = not stateful and all(hasattr(x, "batch_select_indices") for x in self.cache.layers)
        self.live = torch.arange(len(prompts), device=self.device)
        # Mamba's cache goes by another name than the caches of keys and values.
        cache_name = "cache_params" if accepts(model, "cache_params") else "past_key_values"
        self.settings: dict[str, Any] = {cache_name: self.cache, "use_cache": True}
        if accepts(model, "logits_to_keep"):
            self.settings["logits_to_keep"] = 1
        # Looked up once: a signature is slow to read, and this would be for every token.
        self.has_positions = accepts(model, "position_ids")

    def logits(self) -> Tensor:
        extra = dict(self.settings)
        if self.has_positions:
            positions_BT = (self.attention_BT.cumsum(-1) - 1).clamp(min=0)
            extra["position_ids"] = positions_BT[:, -self.new_BT.shape[1] :]
        output = self.model(input_ids=self.new_BT, attention_mask=self.attention_BT, **extra)
        return output.logits[self.live, -1]

    def extend(self, next_B: Tensor) -> None:
        self.new_BT = self.attention_BT.new_zeros(len(self.attention_BT), 1)
        self.new_BT[self.live, 0] = next_B
        self.attention_BT = torch.cat([self.attention_BT, torch.ones_like(self.new_BT)], dim=1)

    def keep(self, rows: Tensor) -> None:
        if not self.can_cut:
            self.live = self.live[rows]
            return
        self.cache.batch_select_indices(rows)
        self.attention_BT = self.attention_BT[rows]
        self.live = torch.arange(len(rows), device=self.device)


class WholeRows:
    """Rows that are read from their beginning for every token, as the trainer reads them."""

    def __init__(self, model: nn.Module, prompts: Seq[tuple[int, ...]]) -> None:
        self.model, self.rows = model, [tuple(prompt) for prompt in prompts]
        self.device = next(model.parameters()).device

    def logits(self) -> Tensor:
        ids_BT, attention_BT = (t.to(self.device) for t in right_padded(self.rows))
        hidden_BTH = padded_hidden(self.model, ids_BT, attention_BT)
        last_B = attention_BT.sum(-1) - 1
        return logits(self.model, hidden_BTH[torch.arange(len(self.rows), device=self.device), last_B])

    def extend(self, next_B: Tensor) -> None:
        self.rows = [(*row, token) for row, token in zip(self.rows, next_B.tolist(), strict=True)]

    def keep(self, rows: Tensor) -> None:
        self.rows = [self.rows[row] for row in rows.tolist()]


def cache_is_exact(model: nn.Module) -> bool:
    """Whether sampling with the cache of transformers follows the trainer's log-probs; tried once a model."""
    known = vars(model).get(_EXACT)
    if known is None:
        known = _try_cache(model)
        setattr(model, _EXACT, known)
        if not known:
            log.warning(
                "the cache of %s is not exact: sampling reads whole rows, slowly", type(model).__name__
            )
    return bool(known)


@torch.no_grad()
def _try_cache(model: nn.Module) -> bool:
    """Some tokens by both ways, from prompts of unlike lengths of which one leaves early."""
    # A window shows where a row reaches beyond it; long ones would take minutes.
    window = getattr(trunk_of(model).config, "sliding_window", None) or 0
    long = trial_documents(model, 32 + (window if window <= 256 else 0))[0].prompt
    prompts = [long[:3], long, long[2:9]]
    try:
        cached, whole = CachedRows(model, prompts), WholeRows(model, prompts)
        for step in range(5):
            logps_BV = [torch.log_softmax(rows.logits().float(), -1) for rows in (cached, whole)]
            gap, allowed = difference(*logps_BV)
            if not gap <= allowed:
                return False
            if step == 1:
                for rows in (cached, whole):
                    rows.keep(torch.tensor([0, 2], device=cached.device))
            if step < 4:
                count = 2 if step else 3
                tokens = torch.tensor(long[step : step + count], device=cached.device)
                for rows in (cached, whole):
                    rows.extend(tokens)
    except RAW_ERRORS:
        return False
    return True
