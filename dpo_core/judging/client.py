"""Client of a judge behind an OpenAI-compatible endpoint: sends one question, returns one reply.

The key is read from the environment and appears in no setting, error, log or cached reply, even if the server
repeats it.
"""

import os
import re
from typing import Any

from pydantic import BaseModel, Field, ValidationError, field_validator

from dpo_core.config import Config
from dpo_core.errors import RecipeError
from dpo_core.http_client import JsonServer, RequestFailed, usable_address
from dpo_core.judging.cache import Reply
from dpo_core.judging.prompts import Message

KEY = "DPO_JUDGE_KEY"
"""Default environment variable of the key."""
_ABOUT_THIS_QUESTION = (400, 413, 422)  # this question is too long or against the rules; others may pass


class Endpoint(Config):
    """Address, model and request settings of a language model used as judge."""

    base_url: str
    """Address up to the version, as `https://api.openai.com/v1` or `http://127.0.0.1:8000/v1`."""
    model: str = Field(min_length=1)
    """The endpoint's name of the judge model."""
    key_env: str = KEY
    """The environment variable that contains the key; a local server needs none."""
    temperature: float | None = Field(0.0, ge=0)
    """Sampling temperature. Empty: not sent, for models that do not accept one."""
    max_tokens: int = Field(256, ge=1)
    """Maximum tokens of a reply; a reasoning model needs thousands."""
    token_field: str = Field("max_tokens", pattern="^max_(completion_)?tokens$")
    """The endpoint's name of that limit; newer models of OpenAI need `max_completion_tokens`."""
    timeout: float = Field(60.0, gt=0)
    """Seconds without received data after which a request counts as failed."""
    retries: int = Field(5, ge=0)
    """Maximum number of retries of a request."""
    concurrency: int = Field(8, ge=1, le=256)
    """Number of parallel requests."""
    price_in: float | None = Field(None, ge=0)
    """Price per million tokens of questions, in any currency; for the cost in the report."""
    price_out: float | None = Field(None, ge=0)
    """Price per million tokens of replies."""

    @field_validator("base_url")
    @classmethod
    def _is_address(cls, url: str) -> str:
        parts = usable_address(url, "the judge's base_url", KEY)
        if parts.query or parts.fragment:
            raise RecipeError(
                "the judge's base_url contains a query, which reports and logs would show",
                f"Remove it, and put the key into the environment variable {KEY}",
            )
        return url.rstrip("/")

    @field_validator("key_env")
    @classmethod
    def _is_name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Z_][A-Z0-9_]{0,63}", name):
            raise RecipeError(
                "the judge's key_env is not the name of an environment variable in capitals",
                "Set key_env to the name, and put the key itself into that variable",
            )
        return name

    @property
    def sampling(self) -> dict[str, Any]:
        """The sampling settings of a request."""
        chosen = {} if self.temperature is None else {"temperature": self.temperature}
        return chosen | {self.token_field: self.max_tokens}

    @property
    def priced(self) -> bool:
        """Whether prices are set, so that costs are known."""
        return self.price_in is not None or self.price_out is not None

    def cost(self, reply: Reply) -> float | None:
        """Cost of a reply; None without prices or without token counts."""
        if not self.priced:
            return None
        if reply.refused:
            return 0.0
        if reply.tokens_in is None or reply.tokens_out is None:
            return None
        price_in, price_out = self.price_in or 0.0, self.price_out or 0.0
        return (reply.tokens_in * price_in + reply.tokens_out * price_out) / 1e6


class Judge:
    """A connection to a judge. Threads may share it.

    Raises:
        RecipeError: the environment variable `key_env` is not set, or cannot be a key.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        if endpoint.key_env != KEY and not os.environ.get(endpoint.key_env, "").strip():
            # Do not show the name: it might be a key that the user wrote in place of a name.
            raise RecipeError(
                "the environment variable named in the judge's key_env is not set",
                f"Set it, or remove key_env if {KEY} contains the key or no key is needed",
            )
        self.endpoint = endpoint
        self._server = JsonServer(
            f"the judge at {endpoint.base_url}",
            f"{endpoint.base_url}/chat/completions",
            address_field="judge.endpoint.base_url",
            token=endpoint.key_env,
            timeout=endpoint.timeout,
            retries=endpoint.retries,
        )

    def ask(self, messages: list[Message]) -> Reply:
        """The judge's reply to one question.

        Raises:
            StageFailed: there is no answer after all attempts, the server rejects all questions, or its
                answer contains no reply.
        """
        question = {"model": self.endpoint.model, "messages": messages} | self.endpoint.sampling
        try:
            content = self._server.post(question)
        except RequestFailed as error:
            if error.status in _ABOUT_THIS_QUESTION:
                return Reply(text="", refused=error.problem.removeprefix(f"{self._server.name} "))
            raise RequestFailed(error.problem, self._remedy(error), error.status) from None
        try:
            answer = _Answer.model_validate_json(content)
            message = answer.choices[0].message
        except (ValidationError, IndexError):
            answer = None
        if answer is None:
            raise self._server.unusable(
                content,
                "a reply",
                "Check that base_url is an OpenAI-compatible endpoint for chat completions, then run again",
            )
        usage = answer.usage or _Usage()
        return Reply(
            text=self._server.clean(message.content or ""),
            tokens_in=usage.prompt_tokens,
            tokens_out=usage.completion_tokens,
        )

    def _remedy(self, error: RequestFailed) -> str:
        if error.status == 404:
            return (
                f"Check that it serves a model named '{self.endpoint.model}', and that base_url ends as in "
                "its documentation, usually in /v1"
            )
        if error.status == 429:
            return "Lower the endpoint's concurrency, raise its retries or its quota, then run again"
        if " did not answer within " in error.problem:
            return "Raise the endpoint's timeout or lower its concurrency, then run again"
        return error.remedy


class _Message(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    message: _Message


class _Usage(BaseModel):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Answer(BaseModel):
    """The fields read from a chat completion; servers differ in the others."""

    choices: list[_Choice]
    usage: _Usage | None = None
