"""A thousand runs on the books: what listing, a cached run and gc cost, beside a workspace with one run.

Wall-clock seconds, the median of three, each against its limit; processor seconds are told beside them.
"""

import json
import os
import statistics
import time
from collections.abc import Callable

import psutil
import pytest

from tests.support.runs.many_runs import multiply
from tests.support.runs.tiny_run import Bench

pytestmark = [pytest.mark.bench, pytest.mark.timeout(3600)]

RUNS, ROUNDS = 1000, 3


def _measured(work: Callable[[], object]) -> tuple[float, float]:
    """Wall-clock and processor seconds of a command, its children included; the medians."""
    took = []
    for _ in range(ROUNDS):
        before, began = os.times(), time.monotonic()
        work()
        after = os.times()
        spent = after.children_user + after.children_system - before.children_user - before.children_system
        took.append((time.monotonic() - began, spent))
    return statistics.median(t for t, _ in took), statistics.median(t for _, t in took)


@pytest.fixture(scope="module")
def benches(finished: tuple[Bench, dict], tmp_path_factory: pytest.TempPathFactory) -> tuple[Bench, Bench]:
    """A workspace with one run and one with a thousand more."""
    few, report = finished
    many = few.copy(str(tmp_path_factory.mktemp("thousand") / "base"))
    multiply(many, report, RUNS)
    return few, many


def _cached_run(bench: Bench) -> None:
    assert set(bench.states(bench.run()).values()) == {"cached"}


def _list(bench: Bench) -> None:
    assert bench.dpo("runs", "--workspace", str(bench.workspace)).returncode == 0


def test_a_thousand_runs(benches: tuple[Bench, Bench]) -> None:
    many = benches[1]
    listed = [_measured(lambda bench=bench: _list(bench)) for bench in benches]  # type: ignore[misc]
    cached = [_measured(lambda bench=bench: _cached_run(bench)) for bench in benches]  # type: ignore[misc]
    told = json.loads(many.dpo("runs", "--json", "--workspace", str(many.workspace)).stdout)
    assert len(told) >= RUNS
    freed: list[dict] = []
    place = ("--workspace", str(many.workspace), "--json")
    collect = _measured(lambda: freed.append(json.loads(many.dpo("gc", *place, "--dry-run").stdout)))
    began = time.monotonic()
    freed.append(json.loads(many.dpo("gc", *place).stdout))
    whole = time.monotonic() - began
    assert freed[-1] == freed[0]
    assert len(freed[-1]["removed"]) >= 2 * (RUNS - 10)
    print(f"\nload {os.getloadavg()[0]:.1f} on {psutil.cpu_count()} cores; wall and processor seconds")
    for name, (one, thousand) in {"dpo runs": listed, "cached dpo run": cached}.items():
        few_runs, many_runs = (f"{wall:6.2f} ({spent:5.2f})" for wall, spent in (one, thousand))
        print(f"{name:16} {few_runs} with few   {many_runs} with {RUNS}")
    print(f"dpo gc --dry-run {collect[0]:6.2f} ({collect[1]:5.2f}); dpo gc {whole:6.2f}")
    assert listed[1][0] < 1.0
    assert cached[1][0] < 20.0
    assert whole < 60.0
