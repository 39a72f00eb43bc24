"""torchrun that also ends when it is cut off; a module to run, with torchrun's own arguments.

Between looks at its ranks torchrun asks the rendezvous store, whose client waits without limit for an
answer that a dead link swallows: on a node that was cut off it holds on until TCP gives up, a quarter of an
hour or more, although its ranks have ended. No option of the c10d rendezvous bounds that, SIGTERM is not
heard in that wait, and nothing can kill a torchrun that is process 1 of its container but itself.
"""

import os
import sys
import threading
import time
from typing import Any

from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.launcher import api

STUCK = 5.0
"""Seconds that the ended ranks may stay uncollected; torchrun looks every 0.1 s."""
STUCK_WITH_RESTARTS = 600.0
"""The same while restarts are left: the others wait so long for this node, and its link may come back."""


class Agent(LocalElasticAgent):
    """torchrun's agent, which ends its process when it does not come to look at its ranks any more."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        threading.Thread(target=self._end_when_stuck, name="stuck", daemon=True).start()

    def _end_when_stuck(self) -> None:
        since = time.monotonic()
        while True:
            time.sleep(0.5)
            ranks = self._pcontext.pids().values() if self._pcontext else ()
            # One that has ended may wait for others of this node, which take their time to save.
            if {_state(pid) for pid in ranks} not in ({"uncollected"}, {"uncollected", "gone"}):
                since = time.monotonic()
            elif time.monotonic() - since > (STUCK_WITH_RESTARTS if self._remaining_restarts else STUCK):
                print(
                    "error: this node is cut off from the one with the rendezvous store, and its ranks have "
                    "ended. Look at their own errors above, then resume the run",
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
