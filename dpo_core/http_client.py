"""HTTP client of servers that may be busy or down: posts JSON, and asks again as its caller decides.

Redirects are not followed: they would repeat the request as a GET, perhaps to another server. The secret of a
client, sent as its bearer token, appears in no error and no log, even if the server repeats it.
"""

import json
import logging
import os
import ssl
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any, Self
from urllib.parse import SplitResult, urlsplit
from urllib.request import getproxies, proxy_bypass

from dpo_core.errors import RecipeError, StageFailed
from dpo_core.redaction import HIDDEN

_SHOWN = 240  # characters of an answer that an error quotes
# These loggers write the server's reason and headers, which may repeat the secret.
_LOGGERS = ("httpx", *(f"httpcore.{part}" for part in ("connection", "http11", "http2", "proxy", "socks")))


@dataclass(frozen=True)
class Answer:
    """A server's answer to a request, or the reason why there is none."""

    problem: str
    """`answered 503`, `did not answer within 60 s` or `could not be reached`."""
    detail: str = ""
    """What may be appended to it: ` Service Unavailable`, ` ([Errno 111] Connection refused)`."""
    status: int = 0
    """0 if there is no answer."""
    headers: Mapping[str, str] = field(default_factory=dict)
    content: bytes = b""

    @property
    def succeeded(self) -> bool:
        return 200 <= self.status < 300

    @property
    def retry_after(self) -> float:
        """Seconds that the server asks to wait; 0 if it does not say."""
        said = self.headers.get("retry-after", "")
        with suppress(ValueError):
            return max(0.0, float(self.headers.get("retry-after-ms", "")) / 1000)
        with suppress(ValueError):
            return max(0.0, float(said))
        with suppress(ValueError):
            return max(0.0, parsedate_to_datetime(said).timestamp() - time.time())
        return 0.0


class JsonServer:
    """A connection to a server, to be used in a `with`. Threads may share it.

    Args:
        name: what errors call the server.
        timeout: seconds without received data after which a request counts as failed.
        secret: the bearer token; empty if there is none.
    """

    def __init__(self, name: str, url: str, *, timeout: float, secret: str) -> None:
        import httpx  # noqa: PLC0415 - takes 0.3 s, and every command imports this module with the recipe

        self.name, self.secret = name, secret
        self._url, self._timeout = url, timeout
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        self._client = httpx.Client(
            headers=headers | ({"Authorization": f"Bearer {secret}"} if secret else {}),
            timeout=timeout,
            # No limit: waiting for another thread's connection would count as a time-out.
            limits=httpx.Limits(),
            # The system's certificates, which may contain a site's own; they take 0.1 s to read.
            verify=ssl.create_default_context() if url.lower().startswith("https") else False,
            proxy=_proxy(url),
            trust_env=False,
        )
        for logger in _LOGGERS:
            logging.getLogger(logger).addFilter(self._cleaned)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()
        for logger in _LOGGERS:
            logging.getLogger(logger).removeFilter(self._cleaned)

    def post(self, body: Any, wait: Callable[[Answer, int], float | None]) -> Answer:
        """The server's answer to a body, which is sent as JSON; the last one if it is asked again.

        Args:
            wait: seconds until the request is repeated after a failure and so many attempts; None: it is not.

        Raises:
            StageFailed: the server's certificate is not trusted.
        """
        # As ASCII: a text cut inside a character is no UTF-8.
        content, attempt = json.dumps(body).encode(), 1
        while not (answer := self._once(content)).succeeded and (pause := wait(answer, attempt)) is not None:
            time.sleep(pause)
            attempt += 1
        return answer

    def _once(self, content: bytes) -> Answer:
        import httpx  # noqa: PLC0415

        try:
            with self._client.stream("POST", self._url, content=content) as answer:
                status, received = answer.status_code, b""
                # A refusal whose text is cut off is still a refusal.
                with suppress(*([] if answer.is_success else [httpx.HTTPError])):
                    received = answer.read()
                phrase = self.clean(f" {answer.reason_phrase}").rstrip()
                return Answer(f"answered {status}", phrase, status, answer.headers, received)
        except httpx.TimeoutException:
            return Answer(f"did not answer within {self._timeout:g} s")
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            # As text alone: a chained error of the package might log the secret.
            why = self.clean(str(error)).rstrip(".") or type(error).__name__
        if "CERTIFICATE_VERIFY_FAILED" in why:
            raise StageFailed(
                f"the certificate of {self.name} is not trusted ({why})",
                "Set SSL_CERT_FILE to its certificate authority, or use another address of the server",
            )
        return Answer("could not be reached", f" ({why})")

    def clean(self, text: str) -> str:
        """The text without the secret. `redaction` only removes long ones."""
        return text.replace(self.secret, HIDDEN) if self.secret else text

    def _cleaned(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = self.clean(record.getMessage()), None
        return True

    def quoted(self, content: bytes) -> str:
        """The beginning of an answer, to be appended to an error's problem."""
        # Redact before cutting: half a secret would not be recognised.
        shown = " ".join(self.clean(content.decode(errors="replace")).split())
        return f": {shown[:_SHOWN]!r}{'…' if len(shown) > _SHOWN else ''}" if shown else ""


def address(url: str) -> SplitResult | None:
    """The parts of a server's address; None if it is not usable."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        return None
    return parts if usable and url.isascii() and all(c > " " for c in url) else None


def secret_of(variable: str) -> str:
    """The secret in an environment variable; empty if it is not set.

    Raises:
        RecipeError: it cannot be sent; the error of the HTTP library would quote it.
    """
    secret = os.environ.get(variable, "").strip()
    if not (secret.isascii() and secret.isprintable()):
        raise RecipeError(
            f"the variable {variable} contains characters that are invalid in an HTTP header",
            f"Set {variable} again, to letters, digits and punctuation of ASCII only",
        )
    return secret


def _proxy(url: str) -> str | None:
    # httpx alone would fail for a SOCKS proxy in ALL_PROXY, even if NO_PROXY contains the server.
    parts, proxies = urlsplit(url), getproxies()
    of_all = proxies.get("all", "")
    proxy = proxies.get(parts.scheme) or (of_all if of_all.startswith("http") else "")
    if not proxy or proxy_bypass(parts.netloc):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"
