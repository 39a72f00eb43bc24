"""HTTP requests to servers that may be down or slow, with a short timeout."""

from typing import Any

import httpx

SECONDS = 3.0


def ask(method: str, address: str, **options: Any) -> httpx.Response | str:
    """The response, or the reason why there is none; waits at most `SECONDS`."""
    try:
        return httpx.request(method, address, timeout=SECONDS, **options)
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        return " ".join(str(error).split()) or type(error).__name__
