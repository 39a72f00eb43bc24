"""Best-effort Prefect artifacts: an outage is logged and ignored; it never fails a stage."""

import logging
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import httpx
from prefect.artifacts import create_link_artifact, create_markdown_artifact
from prefect.context import SettingsContext, get_settings_context
from prefect.settings import PREFECT_API_REQUEST_TIMEOUT, PREFECT_CLIENT_MAX_RETRIES, Settings

log = logging.getLogger("dpo")
T = TypeVar("T")

_PAUSE = 30.0  # seconds without calls after the server did not answer
_PATIENCE = 10.0  # seconds for an answer, in place of Prefect's minute: a stage would wait through it


def artifact_key(name: str) -> str:
    """A name as the key of a Prefect artifact: lower-case letters, digits, single dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


class PrefectArtifacts:
    """Sends a run's artifacts to Prefect."""

    def __init__(self) -> None:
        self._paused_until = 0.0
        self._settings: Settings | None = None

    def send_report(self, name: str, text: str, page: Path, link_text: str) -> None:
        """Send a run's report as Markdown, and a link to its page."""
        self.send(lambda: create_markdown_artifact(key="run-summary", markdown=text, description=name))
        self.send(lambda: create_link_artifact(key="run-page", link=page.as_uri(), link_text=link_text))

    def send(self, call: Callable[[], T]) -> T | None:
        """Call Prefect's API and return its result; None if the server does not answer.

        The call is not repeated. Prefect's engine waits for the server itself, to report the states of the
        run, and ends the run if the server does not come back.
        """
        if time.monotonic() < self._paused_until:
            return None
        try:
            with self._impatient():
                return call()
        except (httpx.HTTPError, RuntimeError) as error:
            # The client raises a RuntimeError if it finds no server.
            if isinstance(error, RuntimeError) and "API" not in str(error):
                raise
            self._paused_until = time.monotonic() + _PAUSE
            log.warning(
                "the Prefect API does not answer (%s); the stage continues, its page there may be incomplete",
                type(error).__name__,
            )
            return None

    def _impatient(self) -> SettingsContext:
        """The current settings, but impatient; made once: making them takes Prefect a tenth of a second."""
        current = get_settings_context()
        if self._settings is None:
            self._settings = current.settings.copy_with_update(
                {PREFECT_CLIENT_MAX_RETRIES: 0, PREFECT_API_REQUEST_TIMEOUT: _PATIENCE}
            )
        return SettingsContext(profile=current.profile, settings=self._settings)
