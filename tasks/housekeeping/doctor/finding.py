"""What a check says, and running many of them so that none can hold up the others."""

import threading
from collections.abc import Callable, Iterable
from typing import Literal

from dpo_core.config import Config
from dpo_core.errors import DpoError

State = Literal["ok", "warning", "failure", "skipped"]
PATIENCE = 60.0
"""Seconds for all checks of a group: a disk that hangs must not hang the doctor."""


class Finding(Config):
    """What one check found."""

    check: str
    state: State
    says: str
    remedy: str = ""
    """What to do; empty where nothing is to be done."""


def ok(check: str, says: str) -> Finding:
    return Finding(check=check, state="ok", says=says)


def skipped(check: str, says: str) -> Finding:
    return Finding(check=check, state="skipped", says=says)


def warning(check: str, says: str, remedy: str) -> Finding:
    return Finding(check=check, state="warning", says=says, remedy=remedy)


def failure(check: str, says: str, remedy: str) -> Finding:
    return Finding(check=check, state="failure", says=says, remedy=remedy)


Check = Callable[[], Iterable[Finding]]


def run_checks(groups: Iterable[tuple[str, Iterable[Check]]], patience: float = PATIENCE) -> list[Finding]:
    """The findings of all checks. Groups run side by side; a check that breaks or hangs is a finding too."""
    started = []
    for name, checks in groups:
        found: list[Finding] = []
        thread = threading.Thread(target=_all, args=(name, list(checks), found), daemon=True)
        thread.start()
        started.append((name, thread, found))
    told = []
    for name, thread, found in started:
        thread.join(patience)
        told += list(found)
        if thread.is_alive():
            hangs = f"a check did not end within {patience:.0f} s"
            told.append(failure(name, hangs, "Look whether the disk or the server behind it hangs"))
    return told


def _all(name: str, checks: list[Check], found: list[Finding]) -> None:
    for check in checks:
        try:
            found.extend(check())
        except DpoError as error:
            found.append(failure(name, error.problem, error.remedy))
        except Exception as error:
            says = f"the check {getattr(check, '__name__', 'itself')} broke: {type(error).__name__}: {error}"
            found.append(failure(name, says, "Report it"))
