"""Asking servers that may be dead, slow or of another kind."""

from collections.abc import Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from tasks.housekeeping.doctor.finding import Finding, warning

SECONDS = 3.0
_SKEW = 60.0


def ask(method: str, address: str, **given: Any) -> httpx.Response | str:
    """The answer, or why there is none, within some seconds."""
    try:
        return httpx.request(method, address, timeout=SECONDS, **given)
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        return " ".join(str(error).split()) or type(error).__name__


def skew(check: str, answer: httpx.Response) -> Iterator[Finding]:
    """Whether the clocks of both sides agree."""
    if "date" not in answer.headers:
        return
    apart = (parsedate_to_datetime(answer.headers["date"]) - datetime.now(UTC)).total_seconds()
    if abs(apart) > _SKEW:
        ahead = "ahead of" if apart > 0 else "behind"
        says = f"the server's clock is {abs(apart):.0f} s {ahead} this machine's"
        yield warning(check, says, "Set both by a time server: schedules and heartbeats go by them")
