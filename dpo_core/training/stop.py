"""Stop signals: on SIGTERM a rank saves its state and exits."""

import os
import signal
from typing import Any


class Stopped(Exception):
    """Raised after a stop signal, once the state is saved; the process may exit.

    Args:
        received: whether this rank itself received the signal.
    """

    def __init__(self, received: bool) -> None:
        super().__init__()
        self.received = received


class StopSignals:
    """Records whether this process has received a stop signal."""

    def __init__(self) -> None:
        self.received = False
        # Ctrl-C in a terminal reaches the flow and the ranks, directly or through torchrun.
        launched = "DPO_LAUNCHED" in os.environ
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) if launched else (signal.SIGTERM,):
            signal.signal(number, self._receive)

    def _receive(self, *_: Any) -> None:
        self.received = True
