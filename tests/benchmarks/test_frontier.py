"""The whole comparison study at demo size, as a user runs it: every policy measured, in under an hour."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.runs.tiny_run import Bench

pytestmark = [pytest.mark.bench, pytest.mark.timeout(4500)]
LIMIT_MINUTES = 60


def test_the_frontier_at_demo_size(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "study")
    bench.folder.mkdir()
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli.main", "run", "frontier", "--json"],
        env=bench.environment(),
        cwd=bench.folder,
        capture_output=True,
        text=True,
        check=False,
    )
    minutes = (time.monotonic() - start) / 60
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    points = report["study"]["points"]
    print(f"\n{len(points)} policies in {minutes:.0f} minutes")
    for policy in ("DPO", "PPO", "PPO-GT", "GRPO"):
        settings = {p["setting"] for p in points if p["policy"] == policy}
        assert len(settings) >= 3, policy
        assert {p["seed"] for p in points if p["policy"] == policy} == {0, 1, 2}
    for claim in report["claims"]:
        print(f"{claim['verdict']:12} {claim['claim']}: {claim['found']}")
        assert claim["verdict"] != "not measured", claim
    # What must hold whatever the study finds: training on the known reward raises it.
    reference = report["study"]["reference_rewards_P"]
    best = max(sum(p["rewards_P"]) / len(p["rewards_P"]) for p in points if p["policy"] == "PPO-GT")
    assert best > sum(reference) / len(reference) + 0.1
    assert minutes < LIMIT_MINUTES
