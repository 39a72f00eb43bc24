"""The recipe's `tokens` section: chat template, the turns that carry loss, and length limits."""

import datetime
import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from dpo_core.config import Config

# Names by which templates read the time; transformers provides `strftime_now`.
_CLOCK = re.compile(r"\b(?:strftime_now|datetime|now)\b")


class TokenConfig(Config):
    """Chat template, the turns that carry loss, and length limits."""

    template: Literal["auto", "chat", "transcript", "plain"] = "auto"
    """How turns are written: the tokenizer's chat template, `Human:`/`Assistant:` transcripts, or plain text.
    `auto`: the chat template for messages, plain text for strings. `chat` makes a string a user turn; the
    others write it unchanged."""
    learn: Literal["last_turn", "all_turns"] = "last_turn"
    """The turns that carry loss: the last turn of an answer, or all its assistant turns (in supervised
    fine-tuning, all of the conversation). User and tool turns never carry loss."""
    template_arguments: dict[str, Any] = Field({})
    """Variables for the chat template, such as {enable_thinking: false}."""
    date: datetime.date | None = None
    """The date for chat templates that write one. Empty: the day on which the data were first read, so that a
    later run of the same data has the same tokens."""
    max_length: int = Field(512, ge=4)
    """Maximum tokens of prompt and completion together."""
    max_prompt_length: int = Field(256, ge=1)
    """Maximum tokens of the prompt if both do not fit: its oldest turns are dropped first, then the beginning
    of the text inside a turn."""

    @field_validator("template_arguments")
    @classmethod
    def _not_the_data(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        own = {"messages", "tools", "documents", "add_generation_prompt", "strftime_now"} & arguments.keys()
        if own:
            raise ValueError(f"{min(own)} cannot be set: it comes from the data or tokens.date")
        return arguments

    @model_validator(mode="after")
    def _room_for_a_completion(self) -> "TokenConfig":
        if self.max_prompt_length >= self.max_length:
            raise ValueError("max_prompt_length must be below max_length, otherwise no answer fits")
        return self


def with_date(config: TokenConfig, template: str | None, day: datetime.date) -> TokenConfig:
    """The config with `day` as its date, if the template reads the date and the config has none."""
    if config.date is not None or not template or not _CLOCK.search(template):
        return config
    return config.model_copy(update={"date": day})
