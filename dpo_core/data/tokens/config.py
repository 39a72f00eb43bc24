"""How text becomes tokens, and how much of it is kept: the settings."""

import datetime
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from dpo_core.config import Config
from dpo_core.data.tokens.chat_template import reads_clock


class TokenConfig(Config):
    """How text becomes tokens, and how much of it is kept."""

    template: Literal["auto", "chat", "transcript", "plain"] = "auto"
    """How turns are written: the tokenizer's chat template, `Human:`/`Assistant:` transcripts, or bare text.
    `auto`: the chat template for messages, bare text for strings. `chat` makes a string the turn of a user;
    the others write it as it stands."""
    learn: Literal["last_turn", "all_turns"] = "last_turn"
    """What carries loss: the last turn of an answer, or every assistant turn of it (and, in supervised
    fine-tuning, of the whole conversation). Turns of users and tools never do."""
    template_arguments: dict[str, Any] = Field({})
    """Variables for the chat template, such as {enable_thinking: false}."""
    date: datetime.date | None = None
    """The day that a chat template writes where it asks for the date. Empty: the day on which the data was
    first read, so that a later run of the same data has the same tokens."""
    max_length: int = Field(512, ge=4)
    """Most tokens of prompt and completion together."""
    max_prompt_length: int = Field(256, ge=1)
    """Most tokens of the prompt when both do not fit: its oldest turns go first, then the beginning of the
    text inside a turn."""

    @field_validator("template_arguments")
    @classmethod
    def _not_the_data(cls, given: dict[str, Any]) -> dict[str, Any]:
        own = {"messages", "tools", "documents", "add_generation_prompt", "strftime_now"} & given.keys()
        if own:
            raise ValueError(f"{min(own)} is not an argument: the data and tokens.date give it")
        return given

    @model_validator(mode="after")
    def _room_for_a_completion(self) -> "TokenConfig":
        if self.max_prompt_length >= self.max_length:
            raise ValueError("max_prompt_length must be below max_length, or no answer fits")
        return self


def settled(config: TokenConfig, template: str | None, day: datetime.date) -> TokenConfig:
    """The config with the day that the template writes, where it asks for one and the config names none."""
    if config.date is not None or not template or not reads_clock(template):
        return config
    return config.model_copy(update={"date": day})
