"""Decides whether questions are asked as plain text or as a user's turn."""

from typing import TYPE_CHECKING

from dpo_core.errors import ModelError
from dpo_core.evaluation.config import SuiteConfig

if TYPE_CHECKING:
    from dpo_core.evaluation.model_under_test import ModelUnderTest


def wants_chat(subject: "ModelUnderTest", config: SuiteConfig) -> bool:
    """Whether questions are asked as a user's turn.

    Raises:
        ModelError: `chat` is always, and the tokenizer has no chat template.
    """
    has_template = bool(subject.tokenizer.chat_template)
    if config.chat == "always" and not has_template:
        raise ModelError(
            f"the tokenizer of {subject.name} has no chat template, and chat is set to always",
            "Set chat to auto or never",
        )
    return has_template and config.chat != "never"
