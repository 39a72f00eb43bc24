"""Starts Prefect's temporary server of a local run in its own session, so that Ctrl-C does not end it."""

import functools
import subprocess
from typing import Any

from prefect.server.api.server import SubprocessASGIServer
from prefect.settings import PREFECT_API_URL, PREFECT_SERVER_ALLOW_EPHEMERAL_MODE

from dpo_core.errors import RecipeError
from tasks.scheduling.prefect_home import REMEDY, unwritable_home


class _Apart(SubprocessASGIServer):
    """A server in its own session.

    Ctrl-C reaches all processes of the terminal's group. If the server ended with the run, Prefect would
    retry again and again to report the run's end to it.
    """

    def _run_uvicorn_command(self) -> "subprocess.Popen[Any]":
        plain = subprocess.Popen
        subprocess.Popen = functools.partial(plain, start_new_session=True)  # type: ignore[misc,assignment]
        try:
            return super()._run_uvicorn_command()
        finally:
            subprocess.Popen = plain  # type: ignore[misc]


def start_temporary_server() -> None:
    """Start the temporary server if no server is configured; Prefect uses it and stops it at the end.

    Raises:
        RecipeError: Prefect's folder is not writable; the server would retry for two minutes.
        RuntimeError: the server did not start.
    """
    if PREFECT_API_URL.value() is None and PREFECT_SERVER_ALLOW_EPHEMERAL_MODE.value():
        if problem := unwritable_home():
            raise RecipeError(f"Prefect cannot write its folder {problem[0]} ({problem[1]})", REMEDY)
        _Apart().start()
