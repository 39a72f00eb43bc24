"""A plugin of pytest (`-p tests.support.time_table`): ends a run with one table, a line for each file."""

from collections import Counter

import pytest

_OUTCOMES = ("passed", "failed", "error", "skipped")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    seconds: Counter[str] = Counter()
    counts: dict[str, Counter[str]] = {}
    for outcome, reports in terminalreporter.stats.items():
        for report in reports:
            if not isinstance(report, pytest.TestReport):
                continue
            file = report.nodeid.partition("::")[0]
            seconds[file] += report.duration
            # Setup and teardown of a test that passed are listed under "".
            if outcome in _OUTCOMES:
                counts.setdefault(file, Counter())[outcome] += 1
    terminalreporter.section("files")
    terminalreporter.write_line(
        f"{'seconds':>9}" + "".join(f"{outcome:>9}" for outcome in _OUTCOMES) + "  file"
    )
    for file, spent in seconds.most_common():
        row = "".join(f"{counts.get(file, Counter())[outcome] or '':>9}" for outcome in _OUTCOMES)
        terminalreporter.write_line(f"{spent:9.1f}{row}  {file}")
