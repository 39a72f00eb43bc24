"""The two token rules: rows over the token budget, and answers that become equal by truncation.

Tokenising a million rows takes minutes, but bytes decide nearly all rows. A token has at least one byte, so a
row whose bytes fit the budget fits it in tokens, and two answers can keep equal tokens only if they begin
with at least that many equal bytes. The other rows are tokenised exactly as in training, or if there are too
many, a seeded sample of them. The bounds hold for lossless tokenizers (byte-level or byte-fallback BPE); a
tokenizer that maps different texts to one unknown token can hide a pair from the second rule.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import pandas as pd

from dpo_core.data.tokens.chat_template import TemplateError
from expectations.features import Budget, Control, Features, _Array, control_of
from expectations.rules import Subject


class Tokens(Protocol):
    """Tokenises text as training does; implemented by `dpo_core.data.tokens.tokenise.Tokenise`."""

    def prompt(self, text: str, chat: bool, budget: int | None = None, tools: str = "") -> Sequence[int]:
        """Ids of a prompt, at most `budget` of them."""
        ...

    def completion(
        self,
        text: str,
        ended: bool,
        prompt: str | None = None,
        chat: bool = False,
        tools: str = "",
        answer_chat: bool = False,
    ) -> Sequence[int]:
        """Ids of an answer to a prompt, with the end token if it ended."""
        ...


@dataclass(frozen=True)
class Tokenisation:
    """The tokenizer, its chat template and the token budget, as far as the gate knows them."""

    tokens: Tokens | None = None
    """The tokeniser (`Tokenise`, or `PlainTokens` around a function); with `max_length` it enables the two
    token rules."""
    max_length: int | None = None
    """Maximum tokens of prompt and answer together."""
    max_prompt_length: int | None = None
    """Maximum tokens of the prompt if both do not fit; for prompts, the budget itself."""
    special_tokens: Sequence[str] = ()
    """The tokenizer's own special tokens, which no text may contain."""
    template_tokens: Sequence[str] = ()
    """Other tokens that its chat template writes; a text that contains one causes a warning."""
    turn_markers: Sequence[str] = ()
    """Words that the template writes around turns, which no conversation may contain."""
    wraps: bool = False
    """Whether text prompts become user turns."""
    template_frame: int | None = None
    """Maximum number of tokens that the template adds to the messages."""

    @property
    def budget(self) -> Budget:
        """The token budget."""
        budget = Budget(self.max_length, self.max_prompt_length)
        return budget if self.template_frame is None else replace(budget, frame=self.template_frame)

    @property
    def control(self) -> Control:
        """Regular expressions for texts that no row may contain."""
        return control_of(self.special_tokens, self.template_tokens, self.turn_markers, self.wraps)


class PlainTokens:
    """`Tokens` from a function text -> ids. A chat is tokenised as its JSON; prompts are cut from the
    left."""

    def __init__(self, encode: Callable[[str], Sequence[int]], eos: int = -1) -> None:
        self.encode = encode
        self.eos = eos

    def refusal(self, row: dict[str, Any]) -> str | None:
        """None: there is no template."""
        return None

    def prompt(self, text: str, chat: bool, budget: int | None = None, tools: str = "") -> Sequence[int]:
        ids = self.encode(text)
        return ids if budget is None else ids[max(len(ids) - budget, 0) :]

    def completion(self, text: str, ended: bool, *_: object) -> Sequence[int]:
        return [*self.encode(text), *([self.eos] if ended else [])]


def _judge_row(tokens: Tokens, row: dict[str, object], budget: Budget, subject: Subject) -> tuple[bool, bool]:
    """(over the budget, answers equal after truncation) of one row."""
    limit = budget.limit(subject)
    assert limit is not None
    text, chat, tools = str(row["prompt"]), bool(row["chat"]), str(row.get("tools") or "")
    about = text, chat, tools, bool(row.get("answer_chat"))
    prompt = tokens.prompt(text, chat, tools=tools)
    if subject == "prompts":
        return len(prompt) > limit, False
    if subject == "unpaired":
        completion = tokens.completion(str(row["completion"]), bool(row["ended"]), *about)
        return len(prompt) + len(completion) > limit, False
    chosen, rejected = (
        tokens.completion(str(row[side]), bool(row[f"{side}_ended"]), *about)
        for side in ("chosen", "rejected")
    )
    if len(prompt) + max(len(chosen), len(rejected)) <= limit:
        return False, False
    if budget.max_prompt_length is not None:
        prompt = tokens.prompt(text, chat, budget.max_prompt_length, tools)
    kept = max(limit - len(prompt), 0)
    return True, list(chosen[:kept]) == list(rejected[:kept])


def token_flags(
    frame: pd.DataFrame,
    features: Features,
    tokens: Tokens,
    budget: Budget,
    subject: Subject,
    *,
    max_candidates: int,
    seed: int,
) -> tuple[dict[str, _Array], dict[str, int]]:
    """Columns over_long and, for pairs, identical_after_truncation: 1 offends, 0 does not, NaN not checked.

    With more than `max_candidates` undecided rows, a seeded share of ALL rows is checked, including decided
    ones, so that the rate over the checked rows is an unbiased estimate of the set's rate.

    Returns:
        The columns, each (rows,) float32, and the number of checked rows for each estimated column.
    """
    wanted = {"over_long": features.maybe_over}
    if subject == "pairs":
        wanted["identical_after_truncation"] = features.maybe_equal
    columns: dict[str, _Array] = {}
    estimated: dict[str, int] = {}
    for name, maybe in wanted.items():
        columns[name] = np.zeros(len(frame), dtype=np.float32)
        count = int(maybe.sum())
        if count > max_candidates:
            looked = np.random.default_rng(seed).random(len(frame)) < max_candidates / count
            columns[name][~looked] = np.nan
            estimated[name] = int(looked.sum())
    look = np.zeros(len(frame), dtype=bool)
    for name, maybe in wanted.items():
        look |= maybe & ~np.isnan(columns[name])
    positions = np.flatnonzero(look)
    for at, row in zip(positions.tolist(), frame.iloc[positions].to_dict("records"), strict=True):
        try:
            hits = _judge_row(tokens, row, budget, subject)
        except TemplateError:  # counted by the rule `template`, or during tokenisation
            continue
        for name, hit in zip(wanted, hits, strict=False):
            if hit and wanted[name][at] and not np.isnan(columns[name][at]):
                columns[name][at] = 1.0
    return columns, estimated
