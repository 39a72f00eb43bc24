"""HTTP requests to servers that may be down or slow, with a short timeout."""

from collections.abc import Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from tasks.housekeeping.doctor.check_result import CheckResult, warning

SECONDS = 3.0
_SKEW = 60.0


def ask(method: str, address: str, **options: Any) -> httpx.Response | str:
    """The response, or the reason why there is none; waits at most `SECONDS`."""
    try:
        return httpx.request(method, address, timeout=SECONDS, **options)
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        return " ".join(str(error).split()) or type(error).__name__


def skew(check: str, answer: httpx.Response) -> Iterator[CheckResult]:
    """Warns if the clocks of server and client differ by more than a minute."""
    if "date" not in answer.headers:
        return
    apart = (parsedate_to_datetime(answer.headers["date"]) - datetime.now(UTC)).total_seconds()
    if abs(apart) > _SKEW:
        ahead = "ahead of" if apart > 0 else "behind"
        says = f"the server's clock is {abs(apart):.0f} s {ahead} this machine's"
        yield warning(check, says, "Synchronise both with a time server: schedules and heartbeats need it")
