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
        # torchrun hands on the signal that it got itself: a terminal's Ctrl-C reaches it with the flow.
        under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) if under_torchrun else (signal.SIGTERM,):
            signal.signal(number, self._receive)

    def _receive(self, *_: Any) -> None:
        self.received = True
