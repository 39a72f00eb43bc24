"""How a question is put: as it stands, or as a user's turn."""

import json

from dpo_core.errors import ModelError
from dpo_core.evaluation.config import SuiteConfig
from dpo_core.evaluation.model_under_test import Asked, Subject


def wants_chat(subject: Subject, config: SuiteConfig) -> bool:
    """Whether questions are put as a user's turn.

    Raises:
        ModelError: they must be, and the tokenizer has no chat template.
    """
    has_template = bool(subject.tokenizer.chat_template)
    if config.chat == "always" and not has_template:
        raise ModelError(
            f"the tokenizer of {subject.name} has no chat template, and chat is set to always",
            "Set chat to auto or never",
        )
    return has_template and config.chat != "never"


def asked(question: str, *, chat: bool) -> Asked:
    """A question as a prompt."""
    return Asked(json.dumps([{"role": "user", "content": question}]) if chat else question, chat)
