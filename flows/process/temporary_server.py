"""The temporary Prefect server of a local run. It starts while the run's modules load, which takes as long.

Prefect's own ends with Ctrl-C, before the run can report its end to it, and outlives a run that is killed.
`python -m flows.process.temporary_server FD` is that server, on an open socket that it inherits.
"""

import atexit
import gc
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from typing import TYPE_CHECKING

import httpx
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_SERVER_ALLOW_EPHEMERAL_MODE,
    PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS,
)

from dpo_core.errors import RecipeError
from tasks.scheduling.prefect_home import REMEDY, unwritable_home

if TYPE_CHECKING:
    import uvicorn

_ADDRESS = "http://127.0.0.1:{port}/api"
_LAST_STATES = 10.0
"""Maximum seconds that the server outlives its run, to save what the run reported last."""


class TemporaryServer:
    """A Prefect server for this process and what it starts; ends with this process."""

    def __init__(self) -> None:
        # Its own session, so that Ctrl-C does not end it: Prefect would retry to report the run's end to it.
        with socket.create_server(("127.0.0.1", 0)) as listening:
            # Requests wait in the socket's queue until the server is up.
            self.address = _ADDRESS.format(port=listening.getsockname()[1])
            self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as this process
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", __name__, str(listening.fileno())],
                pass_fds=[listening.fileno()],
                stdin=subprocess.PIPE,
                stdout=self._errors,
                stderr=self._errors,
                start_new_session=True,
            )
        # Registered before Prefect's own exit handlers, which send the last logs and events: runs after them.
        atexit.register(self._stop)

    def wait(self) -> None:
        """Wait until it answers.

        Raises:
            RecipeError: it ended, or does not answer.
        """
        try:
            httpx.get(
                f"{self.address}/health", timeout=PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS.value()
            ).raise_for_status()
        except httpx.HTTPError as error:
            self._errors.seek(0)
            printed = self._errors.read().decode(errors="replace").strip().splitlines()
            reason = printed[-1] if printed else f"{type(error).__name__}: {error}"
            raise RecipeError(
                f"Prefect's temporary server did not start ({reason})", "Run again, or set PREFECT_API_URL"
            ) from error

    def _stop(self) -> None:
        # The end of stdin ends the server, also where this process is killed. It saves its last states in the
        # background, which takes seconds that nobody needs to wait for.
        assert self._process.stdin
        self._process.stdin.close()


_server: TemporaryServer | None = None


def start_temporary_server() -> None:
    """Start a temporary server if no server is configured, and make it that of this process.

    Raises:
        RecipeError: Prefect's folder is not writable; the server would retry for two minutes.
    """
    global _server
    if PREFECT_API_URL.value() is None and PREFECT_SERVER_ALLOW_EPHEMERAL_MODE.value():
        if problem := unwritable_home():
            raise RecipeError(f"Prefect cannot write its folder {problem[0]} ({problem[1]})", REMEDY)
        _server = TemporaryServer()
        os.environ["PREFECT_API_URL"] = _server.address
        # Loads most of Prefect, now while the server starts.
        from prefect.context import refresh_global_settings_context  # noqa: PLC0415

        refresh_global_settings_context()


def wait_for_temporary_server() -> None:
    """Wait until the temporary server answers, if one was started."""
    if _server is not None:
        _server.wait()


def is_temporary(address: str | None) -> bool:
    """Whether an address is that of this process's temporary server."""
    return _server is not None and address == _server.address


def _end_with_parent(server: "uvicorn.Server") -> None:
    sys.stdin.buffer.read()
    server.should_exit = True
    time.sleep(_LAST_STATES)
    os._exit(0)


def _main() -> None:
    gc.set_threshold(50_000)  # as in `flows.cli.main`
    import uvicorn  # noqa: PLC0415 - a run needs no server packages
    from prefect.server.api.server import create_app  # noqa: PLC0415

    app = create_app(ephemeral=True, final=True)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="on"))
    threading.Thread(target=_end_with_parent, args=[server], daemon=True).start()
    server.run(sockets=[socket.socket(fileno=int(sys.argv[1]))])


if __name__ == "__main__":
    _main()
