"""Client of a judge behind an OpenAI-compatible endpoint: sends one question, returns one reply.

It is asked again after no connection, a time-out, 408, 409, 429 and 5xx: after a Retry-After of up to two
minutes, otherwise after waits that double from half a second to eight. The key is read from the environment
and appears in no setting, error, log or cached reply, even if the server repeats it.
"""

import random
import re
from typing import Any

from pydantic import BaseModel, Field, ValidationError, field_validator

from dpo_core.config import Config
from dpo_core.errors import RecipeError, StageFailed
from dpo_core.http_client import Answer, JsonServer, address, secret_of
from dpo_core.judging.cache import Reply
from dpo_core.judging.prompts import Message

KEY = "DPO_JUDGE_KEY"
"""Default environment variable of the key."""
_ABOUT_THIS_QUESTION = (400, 413, 422)  # this question is too long or against the rules; others may pass
_RESUME = "then run again: finished judgements are kept"
_LONGEST_WAIT = 120.0  # seconds of a Retry-After beyond which nobody waits


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

    # The value is not quoted: a user may have written the key into the wrong field.
    @field_validator("base_url")
    @classmethod
    def _is_address(cls, url: str) -> str:
        parts = address(url)
        if parts is None:
            raise RecipeError("the judge's base_url is not a server address", "Write http://host:port/v1")
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise RecipeError(
                "the judge's base_url contains credentials or a query, which reports and logs would show",
                f"Remove them, and put the key into the environment variable {KEY}",
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


class Judge(JsonServer):
    """A connection to a judge, to be used in a `with`. Threads may share it.

    Raises:
        RecipeError: the environment variable `key_env` is not set, or cannot be a key.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        name, url = f"the judge at {endpoint.base_url}", f"{endpoint.base_url}/chat/completions"
        super().__init__(name, url, timeout=endpoint.timeout, secret=_key(endpoint.key_env))

    def ask(self, messages: list[Message]) -> Reply:
        """The judge's reply to one question.

        Raises:
            StageFailed: there is no answer after all attempts, the server rejects all questions, or its
                answer contains no reply.
        """
        question = {"model": self.endpoint.model, "messages": messages} | self.endpoint.sampling
        answer = self.post(question, self._wait)
        if answer.succeeded:
            return self._reply(answer.content)
        problem = answer.problem + self.quoted(answer.content)
        if answer.status in _ABOUT_THIS_QUESTION:
            return Reply(text="", refused=problem)
        wait = self.clean(answer.headers.get("retry-after", ""))
        if answer.status == 429 and wait:
            problem += f", retry after {wait} s"
        elif _transient(answer.status):
            attempts = self.endpoint.retries + 1
            problem += f", tried {attempts} times" if attempts > 1 else ", tried once"
        problem += "" if answer.status else answer.detail
        raise StageFailed(f"{self.name} {problem}", self._remedy(answer))

    def _wait(self, failed: Answer, attempts: int) -> float | None:
        # OpenAI's servers say whether a retry can help, whatever the status is.
        said = failed.headers.get("x-should-retry")
        again = said == "true" or (said != "false" and _transient(failed.status))
        if not again or attempts > self.endpoint.retries or failed.retry_after > _LONGEST_WAIT:
            return None
        # Random, so that the threads do not all ask again at the same moment.
        return failed.retry_after or 0.25 * 2 ** min(attempts, 5) * random.uniform(0.75, 1)

    def _remedy(self, failed: Answer) -> str:
        have = "a valid key" if self.secret else "the required key"
        target = self.clean(failed.headers.get("location", "it does not say"))
        match failed.status:
            case 0 if failed.detail:
                remedy = "Check that a server runs at that address"
            case 0:
                remedy = "Raise the endpoint's timeout or lower its concurrency"
            case 401 | 403:
                remedy = f"Put {have} into the environment variable {self.endpoint.key_env}"
            case 404:
                model = f"Check that it serves a model named '{self.endpoint.model}'"
                return f"{model}, and that base_url ends as in its documentation, usually in /v1"
            case 429:
                remedy = "Lower the endpoint's concurrency, raise its retries or its quota"
            case status if 300 <= status < 400:
                return f"Set base_url to the redirect's target: {target}"
            case status:
                remedy = "See the server's log" if _transient(status) else "See the endpoint's documentation"
        return f"{remedy}, {_RESUME}"

    def _reply(self, content: bytes) -> Reply:
        try:
            answer = _Answer.model_validate_json(content)
            message = answer.choices[0].message
        except (ValidationError, IndexError):
            answer = None
        if answer is None:
            raise StageFailed(
                f"{self.name} answered without a reply{self.quoted(content)}",
                "Check that base_url is an OpenAI-compatible endpoint for chat completions, " + _RESUME,
            )
        usage = answer.usage or _Usage()
        return Reply(
            text=self.clean(message.content or ""),
            tokens_in=usage.prompt_tokens,
            tokens_out=usage.completion_tokens,
        )


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


def _transient(status: int) -> bool:
    return status in (0, 408, 409, 429) or status >= 500


def _key(name: str) -> str:
    key = secret_of(name)
    if not key and name != KEY:
        # Do not show the name: it might be a key that the user wrote in place of a name.
        raise RecipeError(
            "the environment variable named in the judge's key_env is not set",
            f"Set it, or remove key_env if {KEY} contains the key or no key is needed",
        )
    return key
