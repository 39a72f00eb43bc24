"""A prompt of an evaluation: plain text or chat messages."""

import json
from typing import NamedTuple


class Prompt(NamedTuple):
    """A prompt for generation: text, or the JSON of its messages if `chat`."""

    prompt: str
    chat: bool


def as_prompt(question: str, *, chat: bool) -> Prompt:
    """A question as plain text, or as a user's turn."""
    return Prompt(json.dumps([{"role": "user", "content": question}]) if chat else question, chat)
