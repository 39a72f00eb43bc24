"""Prefect's temporary server of a local run, out of reach of what the terminal sends to the run."""

import functools
import subprocess
from typing import Any

from prefect.server.api.server import SubprocessASGIServer
from prefect.settings import PREFECT_API_URL, PREFECT_SERVER_ALLOW_EPHEMERAL_MODE

from dpo_core.errors import RecipeError
from tasks.scheduling.prefect_home import REMEDY, unwritable_home


class _Apart(SubprocessASGIServer):
    """In a session of its own.

    Ctrl-C reaches every process of the terminal's group. A server that ended with the run could not take the
    news of its end: Prefect would ask one that is gone, again and again.
    """

    def _run_uvicorn_command(self) -> "subprocess.Popen[Any]":
        plain = subprocess.Popen
        subprocess.Popen = functools.partial(plain, start_new_session=True)  # type: ignore[misc,assignment]
        try:
            return super()._run_uvicorn_command()
        finally:
            subprocess.Popen = plain  # type: ignore[misc]


def start_temporary_server() -> None:
    """Start it, where the run is to have one: Prefect takes the one that is there, and stops it at the end.

    Raises:
        RecipeError: its folder cannot be written, so that it would try for two minutes.
        RuntimeError: it did not start.
    """
    if PREFECT_API_URL.value() is None and PREFECT_SERVER_ALLOW_EPHEMERAL_MODE.value():
        if found := unwritable_home():
            raise RecipeError(f"Prefect cannot write its folder {found[0]} ({found[1]})", REMEDY)
        _Apart().start()
