"""The turns of answers, and of conversations that are too long: the oldest are dropped first, then text."""

import json
from collections.abc import Callable

from dpo_core.data.tokens.chat_template import Message

SPEAKERS = {"user": "Human", "assistant": "Assistant", "system": "System", "tool": "Tool"}


def _first_turn(messages: list[Message]) -> int:
    return 1 if messages and messages[0]["role"] == "system" else 0


def can_drop_turn(messages: list[Message]) -> bool:
    """Whether the oldest turn can be dropped: a later user turn exists, which many templates need first."""
    first = _first_turn(messages)
    return len(messages) - first > 1 and _next_opening(messages) is not None


def _next_opening(messages: list[Message]) -> int | None:
    first = _first_turn(messages)
    users = [i for i in range(first + 1, len(messages)) if messages[i]["role"] == "user"]
    return users[0] if users else None


def drop_turn(messages: list[Message]) -> None:
    """Drop the oldest turns up to the next user turn; a system turn stays."""
    following = _next_opening(messages)
    if following is not None:
        del messages[_first_turn(messages) : following]


def shortened(messages: list[Message], fits: Callable[[list[Message]], bool]) -> list[Message] | None:
    """The messages with the beginnings of their texts cut until they fit: oldest first, the system turn last.

    At least one character of each text stays; None if they still do not fit.
    """
    messages = list(messages)
    first = _first_turn(messages)
    for at in [*range(first, len(messages)), *range(first)]:
        text = messages[at].get("content")
        if not isinstance(text, str) or len(text) < 2:
            continue
        if not fits(_ending(messages, at, 1)):
            messages = _ending(messages, at, 1)
            continue
        low, high = 1, len(text)  # fits, does not fit
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(_ending(messages, at, middle)) else (low, middle)
        return _ending(messages, at, low)
    return None


def _ending(messages: list[Message], at: int, characters: int) -> list[Message]:
    """The messages, of one of which only the last characters are kept."""
    cut = {**messages[at], "content": messages[at]["content"][-characters:]}
    return [*messages[:at], cut, *messages[at + 1 :]]


def answer_turns(answer: str, answer_chat: bool) -> list[Message]:
    """The messages of a canonical answer: text, or the JSON of its messages."""
    return list(json.loads(answer)) if answer_chat else [{"role": "assistant", "content": answer}]


def keep_end(ids: list[int], budget: int, keep_first: int) -> list[int]:
    """The last ids, after the first `keep_first` ids (a begin token)."""
    if len(ids) <= budget:
        return ids
    return ids[:keep_first] + ids[len(ids) - (budget - keep_first) :]
