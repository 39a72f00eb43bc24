"""From text to token ids, with the completion mask as data.

ids = prompt ids + completion ids by construction: the two sides are tokenised apart and joined, so chosen and
rejected agree on the prompt to the token. Nothing later infers a mask from token values (pad may equal eos).
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from dpo_core.config import Config
from dpo_core.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TokenConfig(Config):
    """How text becomes tokens, and how much of it is kept."""

    template: Literal["auto", "chat", "transcript", "plain"] = "auto"
    """How turns are written: the tokenizer's chat template, `Human:`/`Assistant:` transcripts, or bare text.
    `auto`: the chat template for messages, bare text for strings."""
    max_length: int = Field(512, ge=4)
    """Most tokens of prompt and completion together."""
    max_prompt_length: int = Field(256, ge=1)
    """Most tokens of the prompt when both do not fit; it is cut from the left, at turn boundaries."""

    @model_validator(mode="after")
    def _room_for_a_completion(self) -> "TokenConfig":
        if self.max_prompt_length >= self.max_length:
            raise ValueError("max_prompt_length must be below max_length, or no answer fits")
        return self


@dataclass(frozen=True)
class Sequence:
    """One prompt with one completion. Each holds at least one id."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    truncated: bool = False

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)


@dataclass(frozen=True)
class TokenPair:
    """A preference pair as ids; both sides share one prompt."""

    id: str
    chosen: Sequence
    rejected: Sequence
    agreement: float | None = field(default=None, kw_only=True)
    """Share of votes for the chosen answer; None where nobody counted."""


class Tokenise:
    """Turns prompts and completions into ids under one `TokenConfig`."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", config: TokenConfig) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.eos: int = tokenizer.eos_token_id
        # The beginning-of-sequence id, where the tokenizer itself would add one.
        added = tokenizer.encode("", add_special_tokens=True)
        self._begin: list[int] = [i for i in added[:1] if i == tokenizer.bos_token_id]

    def prompt(self, text: str, chat: bool, budget: int | None = None) -> tuple[int, ...]:
        """Prompt ids, at most `budget` of them: oldest turns go first, then tokens from the left."""
        if not chat:
            ids = self._begin + self._encode(text)
            return tuple(ids if budget is None else _keep_end(ids, budget, len(self._begin)))
        messages: list[dict[str, str]] = json.loads(text)
        ids = self._render(messages)
        while budget is not None and len(ids) > budget and _can_drop_turn(messages):
            _drop_turn(messages)
            ids = self._render(messages)
        begins = len(self._begin) if ids[: len(self._begin)] == self._begin else 0
        return tuple(ids if budget is None else _keep_end(ids, budget, begins))

    def completion(self, text: str, ended: bool) -> tuple[int, ...]:
        """Completion ids; an answer that ended carries the end-of-sequence token, a cut one does not."""
        return (*self._encode(text), *((self.eos,) if ended else ()))

    def sequence(self, prompt: tuple[int, ...], completion: tuple[int, ...]) -> Sequence | None:
        """Join and cut the completion from the right to `max_length`; None when nothing of it is left.

        A cut answer ends where it was cut: no end-of-sequence token is written over it. Also None without a
        prompt: nothing would predict the first token.
        """
        room = self.config.max_length - len(prompt)
        kept = completion[: max(room, 0)]
        return Sequence(prompt, kept, len(kept) < len(completion)) if prompt and kept else None

    def pair(self, row: dict[str, Any]) -> TokenPair | str:
        """A pair of a canonical row, or the reason why it cannot be used."""
        chosen = self.completion(row["chosen"], row["chosen_ended"])
        rejected = self.completion(row["rejected"], row["rejected_ended"])
        prompt = self.prompt(row["prompt"], row["chat"])
        if len(prompt) + max(len(chosen), len(rejected)) > self.config.max_length:
            prompt = self.prompt(row["prompt"], row["chat"], self.config.max_prompt_length)
        if not prompt:
            return "empty_prompt"
        sides = self.sequence(prompt, chosen), self.sequence(prompt, rejected)
        if sides[0] is None or sides[1] is None:
            return "empty_completion"
        if sides[0].completion == sides[1].completion:
            return "identical_after_truncation"
        agreement = row.get("agreement")
        known = agreement is not None and not math.isnan(agreement)  # parquet gives NaN for an empty field
        return TokenPair(row["id"], sides[0], sides[1], agreement=agreement if known else None)

    def single(self, row: dict[str, Any]) -> Sequence | str:
        """The completion of a canonical unpaired row with its prompt, or the reason why it cannot be used."""
        completion = self.completion(row["completion"], row["ended"])
        prompt = self.prompt(row["prompt"], row["chat"])
        if len(prompt) + len(completion) > self.config.max_length:
            prompt = self.prompt(row["prompt"], row["chat"], self.config.max_prompt_length)
        if not prompt:
            return "empty_prompt"
        return self.sequence(prompt, completion) or "empty_completion"

    def pairs(self, rows: Iterable[dict[str, Any]]) -> tuple[list[TokenPair], dict[str, int]]:
        """All usable pairs, and how many were left out for each reason."""
        kept: list[TokenPair] = []
        dropped: dict[str, int] = {}
        for row in rows:
            result = self.pair(row)
            if isinstance(result, str):
                dropped[result] = dropped.get(result, 0) + 1
            else:
                kept.append(result)
        return kept, dropped

    def _encode(self, text: str) -> list[int]:
        # Text is data: a special token written inside it must not become control. The gate reports such rows.
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def _render(self, messages: list[dict[str, str]]) -> list[int]:
        if self.config.template == "transcript":
            text = "".join(f"\n\n{_SPEAKERS[m['role']]}: {m['content']}" for m in messages)
            text += "\n\nAssistant:"
            return self._begin + self._encode(text)
        if self.config.template == "plain":
            return self._begin + self._encode("\n\n".join(m["content"] for m in messages))
        if not self.tokenizer.chat_template:
            raise ModelError(
                "the prompts are conversations and the tokenizer has no chat template",
                "Set tokens.template to transcript, or model.chat_template to a template file",
            )
        try:
            rendered = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
        except Exception as error:  # a template may refuse roles or their order, or be broken
            roles = ", ".join(m["role"] for m in messages[:8])
            raise ModelError(
                f"the chat template cannot write a conversation of the roles {roles}: {error}",
                "Set tokens.template to transcript, or model.chat_template to another template",
            ) from error
        return list(rendered["input_ids"] if hasattr(rendered, "keys") else rendered)


_SPEAKERS = {"user": "Human", "assistant": "Assistant", "system": "System", "tool": "Tool"}


def _first_turn(messages: list[dict[str, str]]) -> int:
    return 1 if messages[0]["role"] == "system" else 0


def _drop_turn(messages: list[dict[str, str]]) -> None:
    """Drop the oldest turn, and the answer to it: many templates refuse a conversation opened by one."""
    first = _first_turn(messages)
    del messages[first]
    if _can_drop_turn(messages) and messages[first]["role"] == "assistant":
        del messages[first]


def _can_drop_turn(messages: list[dict[str, str]]) -> bool:
    return len(messages) - _first_turn(messages) > 1


def _keep_end(ids: list[int], budget: int, keep_first: int) -> list[int]:
    """The last ids, with the first `keep_first` (a begin token) kept in front."""
    if len(ids) <= budget:
        return ids
    return ids[:keep_first] + ids[len(ids) - (budget - keep_first) :]
