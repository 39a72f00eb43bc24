"""The result of a health check, and a runner that isolates checks that fail or hang."""

import threading
from collections.abc import Callable, Iterable
from typing import Literal

from dpo_core.config import Config
from dpo_core.errors import DpoError

State = Literal["ok", "warning", "failure", "skipped"]
PATIENCE = 60.0
"""Time limit for the checks of a group, in seconds: a disk that hangs must not block the doctor."""


class CheckResult(Config):
    """The result of one check."""

    check: str
    state: State
    says: str
    remedy: str = ""
    """What to do; empty if nothing."""


def ok(check: str, says: str) -> CheckResult:
    return CheckResult(check=check, state="ok", says=says)


def skipped(check: str, says: str) -> CheckResult:
    return CheckResult(check=check, state="skipped", says=says)


def warning(check: str, says: str, remedy: str) -> CheckResult:
    return CheckResult(check=check, state="warning", says=says, remedy=remedy)


def failure(check: str, says: str, remedy: str) -> CheckResult:
    return CheckResult(check=check, state="failure", says=says, remedy=remedy)


Check = Callable[[], Iterable[CheckResult]]


def run_checks(
    groups: Iterable[tuple[str, Iterable[Check]]], patience: float = PATIENCE
) -> list[CheckResult]:
    """The results of all checks. Groups run in parallel; a check that raises or hangs is a failure."""
    started = []
    for name, checks in groups:
        results: list[CheckResult] = []
        thread = threading.Thread(target=_run_group, args=(name, list(checks), results), daemon=True)
        thread.start()
        started.append((name, thread, results))
    all_results = []
    for name, thread, results in started:
        thread.join(patience)
        all_results += list(results)
        if thread.is_alive():
            hangs = f"a check did not end within {patience:.0f} s"
            all_results.append(failure(name, hangs, "Check whether its disk or server hangs"))
    return all_results


def _run_group(name: str, checks: list[Check], results: list[CheckResult]) -> None:
    for check in checks:
        try:
            results.extend(check())
        except DpoError as error:
            results.append(failure(name, error.problem, error.remedy))
        except Exception as error:
            says = f"the check {getattr(check, '__name__', '')} failed with {type(error).__name__}: {error}"
            results.append(failure(name, says, "Please report this as a bug"))
