"""The result of a health check, and a runner that isolates checks that fail."""

from collections.abc import Callable, Iterable
from typing import Literal

from dpo_core.config import Config
from dpo_core.errors import DpoError

State = Literal["ok", "warning", "failure", "skipped"]


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


def run_checks(groups: Iterable[tuple[str, Iterable[Check]]]) -> list[CheckResult]:
    """The results of all checks, by group; a check that raises is a failure of its group."""
    results: list[CheckResult] = []
    for name, checks in groups:
        for check in checks:
            try:
                results.extend(check())
            except DpoError as error:
                results.append(failure(name, error.problem, error.remedy))
            except Exception as error:
                results.append(failure(name, f"{type(error).__name__}: {error}", "Check its disk or server"))
    return results
