"""Computes the logits of the next token, from the model's cache if it is exact, else from complete rows.

Attention caches keys and values; state-space and hybrid models cache other states. Whether sampling with the
cache of transformers gives the trainer's log-probs is tested once for each model. If not, complete rows are
computed again for every token, which is slow but correct.

Shapes: B rows, T tokens so far, V vocabulary.
"""

import logging
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dpo_core.data.tokens.image_codes import image_codes
from dpo_core.scoring.attention import accepts, padded_hidden, trunk_of
from dpo_core.scoring.layout import right_padded
from dpo_core.scoring.lm_head import logits, own_logits
from dpo_core.scoring.packing_check import RAW_ERRORS, difference, trial_documents, trials_of

log = logging.getLogger(__name__)
_EXACT = "the cache is exact"


class TokenRows(Protocol):
    """Rows of tokens that are extended by one token at a time."""

    def logits(self) -> Tensor:
        """(B, V) of the token after each row."""
        ...

    def extend(self, next_B: Tensor) -> None:
        """Append a token to each row."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Keep only these rows."""
        ...


def open_rows(model: nn.Module, prompts: Sequence[tuple[int, ...]], guidance: float = 1.0) -> TokenRows:
    """Rows that start as the prompts, with a cache if it is exact.

    Args:
        guidance: of a model of images; see `SamplingConfig.guidance`.
    """
    kind = CachedRows if cache_is_exact(model) else WholeRows
    rows: TokenRows = kind(model, prompts)
    if guidance == 1:
        return rows
    images = image_codes(model.config)
    assert images, "text is sampled without guidance"
    return GuidedRows(rows, kind(model, [images.null_prompt(prompt) for prompt in prompts]), guidance)


class GuidedRows:
    """The same completions after their prompts and after prompts that say nothing."""

    def __init__(self, given: TokenRows, without: TokenRows, guidance: float) -> None:
        self.given, self.without, self.guidance = given, without, guidance

    def logits(self) -> Tensor:
        without_BV = self.without.logits()
        return without_BV + self.guidance * (self.given.logits() - without_BV)

    def extend(self, next_B: Tensor) -> None:
        self.given.extend(next_B)
        self.without.extend(next_B)

    def keep(self, rows: Tensor) -> None:
        self.given.keep(rows)
        self.without.keep(rows)


class CachedRows:
    """Rows with a cache: only new tokens are computed. Padding is on the left, so that all end together."""

    def __init__(self, model: Any, prompts: Sequence[tuple[int, ...]]) -> None:
        from transformers import DynamicCache  # noqa: PLC0415 - see transformers_lock

        self.model, self.cache = model, DynamicCache(config=model.config)
        self.device = next(model.parameters()).device
        flipped_BT, attention_BT = right_padded([tuple(reversed(prompt)) for prompt in prompts])
        self.new_BT = flipped_BT.flip(-1).to(self.device)
        self.attention_BT = attention_BT.flip(-1).to(self.device)
        # Rows cannot be removed from a recurrent state: ended rows are then computed on and ignored.
        stateful = getattr(model, "_is_stateful", False)
        self.can_cut = not stateful and all(hasattr(x, "batch_select_indices") for x in self.cache.layers)
        self.live = torch.arange(len(prompts), device=self.device)
        # Mamba's cache argument has another name than that of keys and values.
        cache_name = "cache_params" if accepts(model, "cache_params") else "past_key_values"
        self.settings: dict[str, Any] = {cache_name: self.cache, "use_cache": True}
        if accepts(model, "logits_to_keep"):
            self.settings["logits_to_keep"] = 1
        # Looked up once, not for every token: inspecting a signature is slow.
        self.has_positions = accepts(model, "position_ids")

    def logits(self) -> Tensor:
        extra = dict(self.settings)
        if self.has_positions:
            positions_BT = (self.attention_BT.cumsum(-1) - 1).clamp(min=0)
            extra["position_ids"] = positions_BT[:, -self.new_BT.shape[1] :]
        output = self.model(input_ids=self.new_BT, attention_mask=self.attention_BT, **extra)
        return own_logits(self.model, output.logits[self.live, -1])

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
    """Rows without a cache: complete rows are computed for every token, as in the trainer."""

    def __init__(self, model: nn.Module, prompts: Sequence[tuple[int, ...]]) -> None:
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
    """Whether sampling with the cache of transformers gives the trainer's log-probs; tested once a model."""
    tried = trials_of(model)
    if _EXACT not in tried:
        tried[_EXACT] = _test_cache(model)
        if not tried[_EXACT]:
            log.warning(
                "the cache of %s is not exact: sampling computes complete rows for each token, which is slow",
                type(model).__name__,
            )
    return bool(tried[_EXACT])


@torch.no_grad()
def _test_cache(model: nn.Module) -> bool:
    """Compare some tokens of both ways, from prompts of different lengths, one of which leaves early."""
    # A row must be longer than a sliding window to test it; a long window would take minutes.
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
