"""A judge behind an OpenAI-compatible endpoint: one question, one reply.

Waiting and trying again (no connection, a time-out, 408, 409, 429, 5xx) is the `openai` package's: it keeps
to a Retry-After of up to two minutes and otherwise doubles its waits from half a second to eight. The key is
read from the environment and appears in no setting, error, log or kept reply, even if the server repeats it.
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
"""Environment variable of the key, unless the recipe names another."""
_SHOWN = 240  # characters of an answer that an error quotes
_ABOUT_THIS_QUESTION = (400, 413, 422)  # too long for the judge, or against its rules: others may pass
_KEPT = "then run again: what was judged is kept"
# Whatever a server repeats in its headers is logged by these at DEBUG level.
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
    """Where a language model that judges is asked, and how."""

    base_url: str
    """Address up to the version, as `https://api.openai.com/v1` or `http://127.0.0.1:8000/v1`."""
    model: str = Field(min_length=1)
    """The judge, as the endpoint names it."""
    key_env: str = KEY
    """The environment variable that holds the key; a local server needs none."""
    temperature: float | None = Field(0.0, ge=0)
    """Empty: not sent, for models that allow none to be set."""
    max_tokens: int = Field(256, ge=1)
    """Tokens of a reply, at most; a reasoning model needs thousands."""
    token_field: str = Field("max_tokens", pattern="^max_(completion_)?tokens$")
    """What the endpoint calls that limit; newer models of OpenAI ask for `max_completion_tokens`."""
    timeout: float = Field(60.0, gt=0)
    """Seconds without a byte after which a request counts as failed."""
    retries: int = Field(5, ge=0)
    """How often a request is tried again."""
    concurrency: int = Field(8, ge=1, le=256)
    """Requests at a time."""
    price_in: float | None = Field(None, ge=0)
    """Per million tokens of the questions, in any currency; for the cost in the report."""
    price_out: float | None = Field(None, ge=0)
    """Per million tokens of the replies."""

    # A key may have been written into the wrong field, and pydantic's errors quote the value.
    @field_validator("base_url")
    @classmethod
    def _is_address(cls, url: str) -> str:
        try:
            parts = urlsplit(url)
            usable = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1) > 0
        except ValueError:
            usable = None
        if not usable or not url.isascii() or any(c <= " " for c in url):
            raise RecipeError("the judge's base_url is no address of a server", "Write http://host:port/v1")
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise RecipeError(
                "the judge's base_url holds credentials or a query, which every record would show",
                f"Take them out, and put the key into the environment variable {KEY}",
            )
        return url.rstrip("/")

    @field_validator("key_env")
    @classmethod
    def _is_name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Z_][A-Z0-9_]{0,63}", name):
            raise RecipeError(
                "the judge's key_env is no name of an environment variable in capitals",
                "Write the name there, and put the key itself into that variable",
            )
        return name

    @property
    def sampling(self) -> dict[str, Any]:
        """What decides a reply beside the question."""
        chosen = {} if self.temperature is None else {"temperature": self.temperature}
        return chosen | {self.token_field: self.max_tokens}

    @property
    def priced(self) -> bool:
        """Whether a cost can be told."""
        return self.price_in is not None or self.price_out is not None

    def cost(self, reply: Reply) -> float | None:
        """What a reply was charged; None without prices, or where the server did not count tokens."""
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
        RecipeError: the environment variable that `key_env` names is not set, or is no key.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        from openai import DefaultHttpxClient, Omit, OpenAI

        self.endpoint = endpoint
        key = _key(endpoint.key_env)
        # What the package would take from its own variables is meant for another server than this.
        self._headers: dict[str, Any] = {"OpenAI-Organization": Omit(), "OpenAI-Project": Omit()}
        if not key:
            self._headers["Authorization"] = Omit()
        self._client = OpenAI(
            base_url=endpoint.base_url,
            api_key=key or "none",
            timeout=endpoint.timeout,
            max_retries=endpoint.retries,
            # A redirect would send the texts as a GET, perhaps to another server.
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
            StageFailed: no answer after all attempts, a refusal that concerns every question, or an answer
                without a reply in it.
        """
        content, failure = self._send(messages)
        # Raised here: the package's own error would hang on it and might repeat the key in the log.
        if isinstance(failure, DpoError):
            raise failure
        return failure or self._reply(content)

    def _send(self, messages: list[Message]) -> tuple[bytes, DpoError | Reply | None]:
        from openai import APIConnectionError, APIStatusError, APITimeoutError

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
                f"did not answer within {endpoint.timeout:g} s, asked {attempts}",
                f"Raise the endpoint's timeout or lower its concurrency, {_KEPT}",
            )
        except APIConnectionError as error:
            why = error.__cause__ or error
            return b"", self._failed(
                f"could not be reached, tried {attempts} ({type(why).__name__}: {self._clean(str(why))})",
                f"See that a server runs at that address, {_KEPT}",
            )
        except APIStatusError as error:
            return b"", self._refused(error.status_code, error.response.headers, error.response.text)

    def _refused(self, status: int, headers: Any, body: str) -> DpoError | Reply:
        said = f"answered {status}{self._quoted(body)}"
        if status in _ABOUT_THIS_QUESTION:
            return Reply(text="", refused=said)
        if status in (401, 403):
            have = "a valid key" if self._filter.key else "the key that it asks for"
            remedy = f"Put {have} into the environment variable {self.endpoint.key_env}, {_KEPT}"
        elif status == 404:
            remedy = (
                f"See that it serves a model named '{self.endpoint.model}', and that base_url ends as its "
                "documentation says, mostly in /v1"
            )
        elif status == 429:
            wait = self._clean(headers.get("retry-after", ""))
            said += f", asked {self.endpoint.retries + 1} times" if not wait else f", to be asked in {wait} s"
            remedy = f"Lower the endpoint's concurrency, raise its retries, or see to its quota, {_KEPT}"
        elif 300 <= status < 400:
            leads = self._clean(headers.get("location", "it does not say"))
            remedy = f"Set base_url to where it leads: {leads}"
        elif status >= 500 or status in (408, 409):
            said += f", asked {self.endpoint.retries + 1} times"
            remedy = f"See what the server says about it, {_KEPT}"
        else:
            remedy = f"See what the endpoint expects, {_KEPT}"
        return self._failed(said, remedy)

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
                "See that base_url leads to an OpenAI-compatible endpoint for chat completions, " + _KEPT,
            )
        usage = answer.usage or _Usage()
        return Reply(
            text=self._clean(message.content or ""),
            tokens_in=usage.prompt_tokens,
            tokens_out=usage.completion_tokens,
        )

    def _failed(self, what: str, remedy: str) -> StageFailed:
        return StageFailed(f"the judge at {self.endpoint.base_url} {what}", remedy)

    def _clean(self, text: str) -> str:
        return self._filter.clean(text)

    def _quoted(self, text: str) -> str:
        # Cleaned before it is cut: half a key would not be recognised.
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
    """The part of a chat completion that is read; servers differ in the rest."""

    choices: list[_Choice]
    usage: _Usage | None = None


class _WithoutKey(logging.Filter):
    """Takes the key out of log records."""

    def __init__(self, key: str) -> None:
        super().__init__()
        self.key = key

    def clean(self, text: str) -> str:
        return text.replace(self.key, "…") if self.key else text

    def filter(self, record: logging.LogRecord) -> bool:
        if self.key and self.key in (said := record.getMessage()):
            record.msg, record.args = self.clean(said), None
        return True


def _key(name: str) -> str:
    key = os.environ.get(name, "").strip()
    if not key and name != KEY:
        # Not named here: it might be a key that was taken for the name of its variable.
        raise RecipeError(
            "the environment variable that the judge's key_env names is not set",
            f"Set it, or leave key_env out where {KEY} holds the key or none is needed",
        )
    # The error of the HTTP library would quote it.
    if not (key.isascii() and key.isprintable()):
        raise RecipeError(f"the key in {name} holds characters that no header may", "Set it again")
    return key
