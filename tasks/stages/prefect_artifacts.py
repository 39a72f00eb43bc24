"""Best-effort Prefect artifacts: an outage is logged and ignored; it never fails a stage."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import httpx
from prefect.artifacts import create_link_artifact, create_markdown_artifact
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

log = logging.getLogger("dpo")
T = TypeVar("T")

_PAUSE = 30.0  # seconds in which a server that did not answer is not asked again


class PrefectArtifacts:
    """What a run shows on Prefect's pages."""

    def __init__(self) -> None:
        self._away_until = 0.0

    def send_report(self, name: str, text: str, page: Path, link_text: str) -> None:
        """The report of a run in Markdown, and the link to its page."""
        self.send(lambda: create_markdown_artifact(key="run-summary", markdown=text, description=name))
        self.send(lambda: create_link_artifact(key="run-page", link=page.as_uri(), link_text=link_text))

    def send(self, call: Callable[[], T]) -> T | None:
        """What the call to Prefect's API gives; None where the server does not answer.

        Such a call is not tried again. Prefect's engine, which tells the same server the states of the run,
        waits for it, and ends the run where it does not come back.
        """
        if time.monotonic() < self._away_until:
            return None
        try:
            with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):
                return call()
        except (httpx.HTTPError, RuntimeError) as error:
            # The client says in a RuntimeError that no server is there.
            if isinstance(error, RuntimeError) and "API" not in str(error):
                raise
            self._away_until = time.monotonic() + _PAUSE
            log.warning(
                "the Prefect API does not answer (%s); the stage goes on, its page there may be incomplete",
                type(error).__name__,
            )
            return None
