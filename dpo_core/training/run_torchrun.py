"""Runs torchrun, and exits when its node has lost its connection to the rendezvous store.

Between polls of its ranks torchrun queries the rendezvous store, whose client waits for the answer without a
timeout. On a node that is cut off it waits until TCP gives up, a quarter of an hour or more, although its
ranks have ended. No option of the c10d rendezvous limits that wait, SIGTERM does not interrupt it, and a
torchrun that is process 1 of its container can only be ended by itself. The arguments are torchrun's.
"""

import os
import sys
import threading
import time
from typing import Any

from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.launcher import api

STUCK = 5.0
"""Seconds that ranks may have ended without torchrun noticing; it polls them every 0.1 s."""
STUCK_WITH_RESTARTS = 600.0
"""The same while restarts are left: the other nodes wait this long for this one, whose link may come back."""


class Agent(LocalElasticAgent):
    """torchrun's agent, with a thread that ends the process when the agent no longer polls its ranks."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        threading.Thread(target=self._end_when_stuck, name="stuck", daemon=True).start()

    def _end_when_stuck(self) -> None:
        since = time.monotonic()
        while True:
            time.sleep(0.5)
            ranks = self._pcontext.pids().values() if self._pcontext else ()
            # Only when all have ended: a rank that is alive may still be saving.
            if {_state(pid) for pid in ranks} not in ({"uncollected"}, {"uncollected", "gone"}):
                since = time.monotonic()
            elif time.monotonic() - since > (STUCK_WITH_RESTARTS if self._remaining_restarts else STUCK):
                print(
                    "error: this node has lost its connection to the rendezvous store, and its ranks have "
                    "ended. See their errors above, then resume the run",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(1)


def _state(child: int) -> str:
    try:
        ended = os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return "gone"
    return "uncollected" if ended else "alive"


if __name__ == "__main__":
    from torch.distributed.run import main

    api.LocalElasticAgent = Agent  # type: ignore[misc]
    main()
