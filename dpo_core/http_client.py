"""HTTP client of servers that may be busy or down: posts JSON, and asks again what may succeed later.

A request is repeated after no connection, a time-out, 408, 409, 429 and 5xx, unless the answer's header
`x-should-retry` is `false`: after its Retry-After, but two minutes at most, otherwise after waits that double
from half a second to sixteen. (The retries of httpx itself repeat a failed connection only.) Redirects are
not followed: they would repeat the request as a GET, perhaps to another server. The secret of a client, sent
as its bearer token, appears in no error and no log, even if the server repeats it.
"""

import json
import logging
import os
import random
import ssl
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import SplitResult, urlsplit
from urllib.request import getproxies, proxy_bypass

from dpo_core.errors import RecipeError, StageFailed
from dpo_core.redaction import HIDDEN

log = logging.getLogger("dpo")

_SHOWN = 240  # characters of an answer that an error quotes
_LONGEST_WAIT = 120.0  # seconds; a longer Retry-After is cut to this


class RequestFailed(StageFailed):
    """A server gave no usable answer to a request; `status` is 0 if it gave none at all."""

    def __init__(self, problem: str, remedy: str = "", status: int = 0) -> None:
        super().__init__(problem, remedy)
        self.status = status


@dataclass(frozen=True)
class Answer:
    """A server's answer to one request, or the reason why there is none."""

    problem: str
    """`answered 503`, `did not answer within 60 s` or `could not be reached`."""
    status: int = 0
    """0 if there is no answer."""
    headers: Mapping[str, str] = field(default_factory=dict)
    content: bytes = b""

    @property
    def transient(self) -> bool:
        """Whether the same request may succeed later."""
        untrusted = "CERTIFICATE_VERIFY_FAILED" in self.problem
        final = untrusted or self.headers.get("x-should-retry", "") == "false"
        return (self.status in (0, 408, 409, 429) or self.status >= 500) and not final

    @property
    def retry_after(self) -> float:
        """Seconds that the server asks to wait; 0 if it does not say."""
        said = self.headers.get("retry-after", "")
        with suppress(ValueError):
            return max(0.0, float(said))
        with suppress(ValueError):
            return max(0.0, parsedate_to_datetime(said).timestamp() - time.time())
        return 0.0


class JsonServer:
    """A connection to a server, kept open between requests. Threads may share it.

    Args:
        name: what errors call the server.
        address_field: the field of the recipe with the address, for errors.
        token: the environment variable of the bearer token.
        timeout: seconds without received data after which a request counts as failed.
        retries: maximum number of repetitions of a request.

    Raises:
        RecipeError: the token cannot be sent.
    """

    def __init__(
        self, name: str, url: str, *, address_field: str, token: str, timeout: float, retries: int
    ) -> None:
        import httpx  # noqa: PLC0415 - takes 0.3 s, and every command imports this module with the recipe

        self.name, self.secret = name, os.environ.get(token, "").strip()
        if not (self.secret.isascii() and self.secret.isprintable()):
            # The error of httpx would quote it.
            raise RecipeError(
                f"the variable {token} contains characters that are invalid in an HTTP header",
                f"Set {token} again, to letters, digits and punctuation of ASCII only",
            )
        self._url, self._timeout, self._retries = url, timeout, retries
        self._address_field, self._token = address_field, token
        # Their lines repeat headers and the server's reasons, which may contain the secret.
        for logger in ("httpx", "httpcore"):
            logging.getLogger(logger).setLevel(logging.WARNING)
        self._client = httpx.Client(
            headers={"Content-Type": "application/json", "Accept": "application/json"}
            | ({"Authorization": f"Bearer {self.secret}"} if self.secret else {}),
            timeout=timeout,
            # No limit: waiting for another thread's connection would count as a time-out.
            limits=httpx.Limits(),
            # The system's certificates, which may contain a site's own; reading them takes 0.1 s.
            verify=ssl.create_default_context() if url.lower().startswith("https") else False,
            proxy=_proxy(url),
            trust_env=False,
        )

    def post(self, body: Any) -> bytes:
        """The content of the server's answer to a body, which is sent as JSON.

        Raises:
            RequestFailed: there is no answer after all attempts, or the server rejects the request.
        """
        content = json.dumps(body).encode()  # as ASCII: a text cut inside a character is no UTF-8
        attempt = 1
        while not 200 <= (answer := self._once(content)).status < 300:
            if not answer.transient or attempt > self._retries:
                raise self._failure(answer, attempt)
            # Random, so that threads do not all ask again at the same moment.
            wait = min(answer.retry_after, _LONGEST_WAIT) or 0.25 * 2 ** min(attempt, 6) * random.uniform(
                0.75, 1
            )
            log.warning("%s %s; trying again in %.1f s", self.name, answer.problem, wait)
            time.sleep(wait)
            attempt += 1
        return answer.content

    def _once(self, content: bytes) -> Answer:
        import httpx  # noqa: PLC0415

        try:
            with self._client.stream("POST", self._url, content=content) as answer:
                received = b""
                # A refusal whose text is cut off is still a refusal.
                with suppress(*([] if answer.is_success else [httpx.HTTPError])):
                    received = answer.read()
                status = answer.status_code
                return Answer(f"answered {status}", status, answer.headers, received)
        except httpx.TimeoutException:
            return Answer(f"did not answer within {self._timeout:g} s")
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            # As text alone: a chained error of the package might log the secret.
            why = self.clean(str(error)).rstrip(".") or type(error).__name__
        return Answer(f"could not be reached ({why})")

    def _failure(self, answer: Answer, attempts: int) -> RequestFailed:
        problem = f"{self.name} {answer.problem}{self._quoted(answer.content)}"
        if attempts > 1:
            problem += f", tried {attempts} times"
        if answer.retry_after:
            problem += f", retry after {answer.retry_after:.0f} s"
        return RequestFailed(problem, self._remedy(answer), answer.status)

    def _remedy(self, answer: Answer) -> str:
        if "CERTIFICATE_VERIFY_FAILED" in answer.problem:
            return "Set SSL_CERT_FILE to its certificate authority, or use another address of the server"
        if answer.status in (401, 403):
            return f"Put a valid token into the environment variable {self._token}, then run again"
        if 300 <= answer.status < 400:
            target = self.clean(answer.headers.get("location", "it does not say"))
            return f"Set {self._address_field} to the redirect's target: {target}"
        if answer.transient:
            return "Check that the server runs and is fast enough, then run again"
        return f"Check {self._address_field} and the server's documentation, then run again"

    def unusable(self, content: bytes, missing: str, remedy: str) -> StageFailed:
        """The error for an answer without what was asked for."""
        return StageFailed(f"{self.name} answered without {missing}{self._quoted(content)}", remedy)

    def clean(self, text: str) -> str:
        """The text without the secret. `redaction` only removes long ones."""
        return text.replace(self.secret, HIDDEN) if self.secret else text

    def _quoted(self, content: bytes) -> str:
        """The beginning of an answer, to be appended to an error's problem."""
        # Redact before cutting: half a secret would not be recognised.
        shown = " ".join(self.clean(content.decode(errors="replace")).split())
        return f": {shown[:_SHOWN]!r}{'…' if len(shown) > _SHOWN else ''}" if shown else ""


def usable_address(url: str, field: str, token: str) -> SplitResult:
    """The parts of a server's address.

    Args:
        field: the field of the recipe with the address. The address is not quoted: a user may have written a
            secret into the wrong field.
        token: the environment variable of the server's bearer token.

    Raises:
        RecipeError: it is not an address, or contains credentials.
    """
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        usable = None
    if not usable or not url.isascii() or any(c <= " " for c in url):
        raise RecipeError(f"{field} is not a server address", "Write http://host:port/path")
    if "@" in parts.netloc:
        raise RecipeError(
            f"{field} contains credentials, which reports and logs would show",
            f"Remove them, and put a token into the environment variable {token}",
        )
    return parts


def _proxy(url: str) -> str | None:
    # httpx alone would fail for a SOCKS proxy in ALL_PROXY, even if NO_PROXY contains the server.
    parts, proxies = urlsplit(url), getproxies()
    of_all = proxies.get("all", "")
    proxy = proxies.get(parts.scheme) or (of_all if of_all.startswith("http") else "")
    if not proxy or proxy_bypass(parts.netloc):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"
