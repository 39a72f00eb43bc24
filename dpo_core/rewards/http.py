"""Client of a reward server: sends prompts and completions over HTTP, returns rewards.

Each request is `POST {"prompts": [...], "completions": [...]}` as JSON. The answer is `{"rewards": [...]}` or
the list alone: one number for each completion, in order. The prompt of a conversation is the JSON of its
messages.
"""

import http.client
import json
import logging
import os
import ssl
import time
from email.message import Message
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from dpo_core.errors import RecipeError, StageFailed
from dpo_core.redaction import HIDDEN

log = logging.getLogger(__name__)

TOKEN = "DPO_REWARD_TOKEN"
"""Environment variable of the bearer token, which appears in no recipe, artifact or log."""
_LONGEST_WAIT = 30.0
_SHOWN = 160  # characters of an answer that an error quotes


def is_url(spec: str) -> bool:
    """Whether a recipe's reward is a server's address."""
    return spec.lower().startswith(("http://", "https://"))


class HttpReward:
    """Sends batches to a server; retries transient failures (no connection, 429, 5xx) with growing waits.

    Args:
        batch_size: completions per request.
        timeout: seconds without received data after which a request counts as failed.
        attempts: maximum number of attempts per batch.
        first_wait: seconds before the second attempt; doubled before each further one.

    Raises:
        RecipeError: the address is invalid.
    """

    def __init__(
        self,
        url: str,
        *,
        batch_size: int = 64,
        timeout: float = 60.0,
        attempts: int = 6,
        first_wait: float = 1.0,
    ) -> None:
        _check_address(url)
        self.name = url
        self.batch_size, self.timeout = batch_size, timeout
        self.attempts, self.first_wait = attempts, first_wait

    def __call__(self, prompts: list[str], completions: list[str]) -> list[Any]:
        """The rewards of the server, one per completion; `CheckedReward` checks the values.

        Raises:
            StageFailed: the server is unreachable, rejects the request, or answers without rewards.
        """
        rewards: list[Any] = []
        for start in range(0, len(completions), self.batch_size):
            part = slice(start, start + self.batch_size)
            rewards += self._request(prompts[part], completions[part])
        return rewards

    def _request(self, prompts: list[str], completions: list[str]) -> list[Any]:
        body = json.dumps({"prompts": prompts, "completions": completions}).encode()
        for attempt in range(1, self.attempts + 1):
            try:
                return self._rewards(self._once(body), len(completions))
            except _TransientError as error:
                if attempt == self.attempts:
                    raise StageFailed(
                        f"the reward at {self.name} failed {attempt} times; the last time it {error.why}",
                        "Check that the server runs and is fast enough, then run again",
                    ) from error
                wait = min(max(self.first_wait * 2 ** (attempt - 1), error.wait), _LONGEST_WAIT)
                log.warning("the reward at %s %s; trying again in %.1f s", self.name, error.why, wait)
                time.sleep(wait)
        raise AssertionError("the last attempt returns or raises")

    def _once(self, body: bytes) -> bytes:
        request = Request(self.name, data=body, headers=_headers(), method="POST")
        try:
            with _OPENER.open(request, timeout=self.timeout) as answer:
                content: bytes = answer.read()
                return content
        except HTTPError as error:
            with error:
                raise self._of_status(error) from error
        except (URLError, OSError, http.client.HTTPException) as error:
            reason = error.reason if isinstance(error, URLError) else error
            if isinstance(reason, ssl.SSLCertVerificationError):
                raise StageFailed(
                    f"the certificate of the reward at {self.name} is not trusted ({reason.verify_message})",
                    "Set SSL_CERT_FILE to its certificate authority, or use another address of the server",
                ) from error
            if isinstance(reason, TimeoutError):
                raise _TransientError(f"did not answer within {self.timeout:g} s") from error
            raise _TransientError(f"could not be reached ({reason or type(reason).__name__})") from error

    def _of_status(self, error: HTTPError) -> Exception:
        problem = _without_token(f"answered {error.code} {error.reason}")
        if error.code == 429 or error.code >= 500:
            return _TransientError(problem, _seconds(error.headers.get("Retry-After")))
        if 300 <= error.code < 400:
            target = _without_token(error.headers.get("Location", "it does not say"))
            remedy = f"Set reward.source to the redirect's target: {target}"
        elif error.code in (401, 403):
            remedy = f"Put a valid token into the environment variable {TOKEN}"
        else:
            remedy = "Check the address in reward.source and the server's documentation"
        return StageFailed(f"the reward at {self.name} {problem}{_quoted(_read(error))}", remedy)

    def _rewards(self, content: bytes, expected: int) -> list[Any]:
        try:
            answer = json.loads(content)
        except ValueError:
            answer = None
        rewards = answer.get("rewards") if isinstance(answer, dict) else answer
        if not isinstance(rewards, list):
            raise StageFailed(
                f"the reward at {self.name} answered without rewards{_quoted(content)}",
                'Make the server answer {"rewards": [numbers]}, one number for each completion',
            )
        # Check each request: one short and one long answer must not shift the rewards between rows.
        if len(rewards) != expected:
            raise StageFailed(
                f"the reward at {self.name} answered {len(rewards)} rewards for {expected} completions",
                "Make the server answer exactly one number for each completion, in order",
            )
        return rewards


class _TransientError(Exception):
    """A failure that a retry may overcome."""

    def __init__(self, why: str, wait: float = 0.0) -> None:
        super().__init__(why)
        self.why, self.wait = why, wait


class _StayHere(HTTPRedirectHandler):
    """Follows no redirect, which would repeat the request as a GET and send the token to another server."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> None:
        return None


_OPENER = build_opener(_StayHere)


def _check_address(url: str) -> None:
    try:
        parts = urlsplit(url)
        usable = parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        usable = None
    if not usable or not url.isascii() or any(c <= " " for c in url):
        raise RecipeError(f"the reward {url!r} is not a server address", "Write http://host:port/path")
    if parts.username is not None or parts.password is not None:
        # Do not quote the address: the message is logged.
        raise RecipeError(
            f"the address of the reward at {parts.hostname} contains credentials, which reports and logs "
            "would show",
            f"Remove them, and put a token into the environment variable {TOKEN}",
        )


def _headers() -> dict[str, str]:
    token = os.environ.get(TOKEN, "").strip()
    # The error of http.client would quote the token.
    if not (token.isascii() and token.isprintable()):
        problem = f"the token in {TOKEN} contains characters that are invalid in an HTTP header"
        raise RecipeError(problem, f"Set {TOKEN} again, to letters, digits and punctuation of ASCII only")
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    return headers | ({"Authorization": f"Bearer {token}"} if token else {})


def _read(error: HTTPError) -> bytes:
    try:
        return error.read(4 * _SHOWN)
    except (OSError, http.client.HTTPException):
        return b""


def _quoted(content: bytes) -> str:
    """The beginning of an answer, for an error message, without the token."""
    text = _without_token(" ".join(content[: 4 * _SHOWN].decode(errors="replace").split()))
    return f": {text[:_SHOWN]!r}" if text else ""


def _without_token(text: str) -> str:
    """Remove the token from a text. `redaction` only removes long ones."""
    token = os.environ.get(TOKEN, "").strip()
    return text.replace(token, HIDDEN) if token else text


def _seconds(text: str | None) -> float:
    """A Retry-After header in seconds; 0 if it is missing or a date."""
    try:
        return max(float(text or 0), 0.0)
    except ValueError:
        return 0.0
