"""A prompt that a model answers: text as it stands, or a user's turn."""

import json
from typing import NamedTuple


class Asked(NamedTuple):
    """A prompt for generation: text, or the JSON of its messages where `chat`."""

    prompt: str
    chat: bool


def asked(question: str, *, chat: bool) -> Asked:
    """A question as a prompt."""
    return Asked(json.dumps([{"role": "user", "content": question}]) if chat else question, chat)
