"""A worker of pytest-xdist, forked from the process with the libraries: `worker.py ADDRESS -u -c CODE`.

pytest-xdist starts this file in the place of Python; the code that it gives runs in the forked process.
"""

import os
import sys
from multiprocessing import forkserver, get_context, resource_tracker
from multiprocessing.connection import Connection
from typing import Any


def join_server(address: str) -> None:
    """Let this process fork from the server at an address, which another process started and ends."""
    server: Any = forkserver._forkserver
    server.ensure_running = resource_tracker.ensure_running
    server._forkserver_address = address
    server._forkserver_alive_fd = os.open(os.devnull, os.O_RDONLY)


def _become(address: str, code: str, environment: dict[str, str], streams: list[Connection]) -> None:
    from tests.support.runs.forked import set_environment

    set_environment(environment)
    join_server(address)
    for number, stream in enumerate(streams):
        os.dup2(stream.fileno(), number)
        stream.close()
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
    exec(code, {"__name__": "__main__"})


if __name__ == "__main__":
    join_server(sys.argv[1])
    streams = [Connection(os.dup(number)) for number in range(3)]
    worker = get_context("forkserver").Process(
        target=_become, args=(sys.argv[1], sys.argv[-1], dict(os.environ), streams)
    )
    worker.start()
    for stream in streams:
        stream.close()
    worker.join()
    sys.exit(worker.exitcode)
