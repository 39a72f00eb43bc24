"""Client of a judge behind an OpenAI-compatible endpoint: sends one question, returns one reply.

The `openai` package retries (no connection, time-out, 408, 409, 429, 5xx): it respects a Retry-After of up to
two minutes, otherwise it doubles its waits from half a second to eight. The key is read from the environment
and appears in no setting, error, log or cached reply, even if the server repeats it.
"""

import logging
import os
import re
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel, Field, ValidationError, field_validator

from dpo_core.config import Config
from dpo_core.errors import DpoError, RecipeError, StageFailed
from dpo_core.judging.cache import Reply
from dpo_core.judging.prompts import Message

KEY = "DPO_JUDGE_KEY"
"""Default environment variable of the key."""
_SHOWN = 240  # characters of an answer that an error quotes
_ABOUT_THIS_QUESTION = (400, 413, 422)  # this question is too long or against the rules; others may pass
_RESUME = "then run again: finished judgements are kept"
# These loggers write the server's headers, which may repeat the key, at DEBUG level.
_LOGGERS = (
    "openai._base_client",
    *(f"httpx{n}" for n in ("", "2")),
    *(
        f"httpcore{n}.{part}"
        for n in ("", "2")
        for part in ("connection", "http11", "http2", "proxy", "socks")
    ),
)


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
        try:
            parts = urlsplit(url)
            usable = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1) > 0
        except ValueError:
            usable = None
        if not usable or not url.isascii() or any(c <= " " for c in url):
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


class Judge:
    """A connection to a judge; close it, or use it in a `with`. Threads may share it.

    Raises:
        RecipeError: the environment variable `key_env` is not set, or cannot be a key.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        from openai import DefaultHttpxClient, Omit, OpenAI  # noqa: PLC0415 - takes a second

        self.endpoint = endpoint
        key = _key(endpoint.key_env)
        # Omit values that the package would read from its own variables: they belong to another server.
        self._headers: dict[str, Any] = {"OpenAI-Organization": Omit(), "OpenAI-Project": Omit()}
        if not key:
            self._headers["Authorization"] = Omit()
        self._client = OpenAI(
            base_url=endpoint.base_url,
            api_key=key or "none",
            timeout=endpoint.timeout,
            max_retries=endpoint.retries,
            # A redirect would repeat the request as a GET, perhaps to another server.
            http_client=DefaultHttpxClient(follow_redirects=False, timeout=endpoint.timeout),
        )
        self._filter = _WithoutKey(key)
        for name in _LOGGERS:
            logging.getLogger(name).addFilter(self._filter)

    def __enter__(self) -> "Judge":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._client.close()
        for name in _LOGGERS:
            logging.getLogger(name).removeFilter(self._filter)

    def ask(self, messages: list[Message]) -> Reply:
        """The judge's reply to one question.

        Raises:
            StageFailed: there is no answer after all attempts, the server rejects all questions, or its
                answer contains no reply.
        """
        content, failure = self._send(messages)
        # Raise here, outside the except blocks: a chained error of the package might log the key.
        if isinstance(failure, DpoError):
            raise failure
        return failure or self._reply(content)

    def _send(self, messages: list[Message]) -> tuple[bytes, DpoError | Reply | None]:
        from openai import APIConnectionError, APIStatusError, APITimeoutError  # noqa: PLC0415 - takes a second

        endpoint = self.endpoint
        attempts = f"{endpoint.retries + 1} times" if endpoint.retries else "once"
        try:
            answer = self._client.chat.completions.with_raw_response.create(
                model=endpoint.model,
                messages=messages,  # type: ignore[arg-type]
                extra_headers=self._headers,
                **endpoint.sampling,
            )
            return answer.content, None
        except APITimeoutError:
            return b"", self._failed(
                f"did not answer within {endpoint.timeout:g} s, tried {attempts}",
                f"Raise the endpoint's timeout or lower its concurrency, {_RESUME}",
            )
        except APIConnectionError as error:
            cause = error.__cause__ or error
            return b"", self._failed(
                f"could not be reached, tried {attempts} ({type(cause).__name__}: {self._clean(str(cause))})",
                f"Check that a server runs at that address, {_RESUME}",
            )
        except APIStatusError as error:
            return b"", self._refused(error.status_code, error.response.headers, error.response.text)

    def _refused(self, status: int, headers: Any, body: str) -> DpoError | Reply:
        problem = f"answered {status}{self._quoted(body)}"
        if status in _ABOUT_THIS_QUESTION:
            return Reply(text="", refused=problem)
        if status in (401, 403):
            have = "a valid key" if self._filter.key else "the required key"
            remedy = f"Put {have} into the environment variable {self.endpoint.key_env}, {_RESUME}"
        elif status == 404:
            remedy = (
                f"Check that it serves a model named '{self.endpoint.model}', and that base_url ends as in "
                "its documentation, usually in /v1"
            )
        elif status == 429:
            wait = self._clean(headers.get("retry-after", ""))
            problem += f", retry after {wait} s" if wait else f", tried {self.endpoint.retries + 1} times"
            remedy = f"Lower the endpoint's concurrency, raise its retries or its quota, {_RESUME}"
        elif 300 <= status < 400:
            target = self._clean(headers.get("location", "it does not say"))
            remedy = f"Set base_url to the redirect's target: {target}"
        elif status >= 500 or status in (408, 409):
            problem += f", tried {self.endpoint.retries + 1} times"
            remedy = f"See the server's log, {_RESUME}"
        else:
            remedy = f"See the endpoint's documentation, {_RESUME}"
        return self._failed(problem, remedy)

    def _reply(self, content: bytes) -> Reply:
        text = content.decode(errors="replace")
        try:
            answer = _Answer.model_validate_json(content)
            message = answer.choices[0].message
        except (ValidationError, IndexError):
            answer = None
        if answer is None:
            raise self._failed(
                f"answered without a reply{self._quoted(text)}",
                "Check that base_url is an OpenAI-compatible endpoint for chat completions, " + _RESUME,
            )
        usage = answer.usage or _Usage()
        return Reply(
            text=self._clean(message.content or ""),
            tokens_in=usage.prompt_tokens,
            tokens_out=usage.completion_tokens,
        )

    def _failed(self, problem: str, remedy: str) -> StageFailed:
        return StageFailed(f"the judge at {self.endpoint.base_url} {problem}", remedy)

    def _clean(self, text: str) -> str:
        return self._filter.clean(text)

    def _quoted(self, text: str) -> str:
        # Redact before cutting: half a key would not be recognised.
        shown = " ".join(self._clean(text).split())
        return f": {shown[:_SHOWN]!r}{'…' if len(shown) > _SHOWN else ''}" if shown else ""


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


class _WithoutKey(logging.Filter):
    """A log filter that removes the key."""

    def __init__(self, key: str) -> None:
        super().__init__()
        self.key = key

    def clean(self, text: str) -> str:
        return text.replace(self.key, "…") if self.key else text

    def filter(self, record: logging.LogRecord) -> bool:
        if self.key and self.key in (message := record.getMessage()):
            record.msg, record.args = self.clean(message), None
        return True


def _key(name: str) -> str:
    key = os.environ.get(name, "").strip()
    if not key and name != KEY:
        # Do not show the name: it might be a key that the user wrote in place of a name.
        raise RecipeError(
            "the environment variable named in the judge's key_env is not set",
            f"Set it, or remove key_env if {KEY} contains the key or no key is needed",
        )
    # The error of the HTTP library would quote the key.
    if not (key.isascii() and key.isprintable()):
        problem = f"the key in {name} contains characters that are invalid in an HTTP header"
        raise RecipeError(problem, f"Set {name} again, to letters, digits and punctuation of ASCII only")
    return key
