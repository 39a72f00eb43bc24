"""What Prefect is told for people to look at: a server that is away must not cost a stage its work."""

import logging
import time
from collections.abc import Callable
from typing import TypeVar

log = logging.getLogger("dpo")
T = TypeVar("T")

_PAUSE = 30.0  # seconds in which a server that did not answer is not asked again
_away_until = 0.0


def tell(call: Callable[[], T]) -> T | None:
    """What the call to Prefect's API gives; None where the server does not answer.

    Such a call is not tried again. Prefect's engine, which tells the same server the states of the run, waits
    for it, and ends the run where it does not come back.
    """
    global _away_until
    if time.monotonic() < _away_until:
        return None
    import httpx
    from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    try:
        with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):
            return call()
    except (httpx.HTTPError, RuntimeError) as error:
        # The client says in a RuntimeError that no server is there.
        if isinstance(error, RuntimeError) and "API" not in str(error):
            raise
        _away_until = time.monotonic() + _PAUSE
        log.warning(
            "the Prefect API does not answer (%s); the stage goes on, and its page there may lack something",
            type(error).__name__,
        )
        return None
