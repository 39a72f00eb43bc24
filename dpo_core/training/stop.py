"""A stop on purpose: the signals that ask a rank to save its state and end."""

import os
import signal
from typing import Any


class Stopped(Exception):
    """A signal to stop came: the state is saved and the process may end.

    Args:
        told: whether it came to this very rank.
    """

    def __init__(self, told: bool) -> None:
        super().__init__()
        self.told = told


class StopSignals:
    """Remembers that this process was asked to stop."""

    def __init__(self) -> None:
        self.received = False
        # A terminal's Ctrl-C reaches the ranks with the flow, directly or through torchrun.
        launched = "DPO_LAUNCHED" in os.environ
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) if launched else (signal.SIGTERM,):
            signal.signal(number, self._receive)

    def _receive(self, *_: Any) -> None:
        self.received = True
