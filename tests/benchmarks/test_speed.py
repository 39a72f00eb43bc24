"""The comparison of training speed with TRL, on a tiny model."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    "--set", "size=tiny", "--set", "workload=long-answer", "--set", "pairs=6", "--set", "batch_size=2",
    "--set", "rounds=1", "--set", "threads=1", "--set", "ours={precision: fp32, pack_tokens: 2048}",
]  # fmt: skip


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.benchmarks.speed", *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.slow
def test_ours_alone_is_measured_without_trl():
    done = bench(*TINY, "--set", "trl=null")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    ours = found["results"]["ours"]
    assert ours["pairs_per_second"] > 0
    assert len(ours["rounds"]) == 1
    # Every pair has two prompts of about 80 and two answers of about 200 tokens.
    assert 300 < ours["tokens_per_second"] / ours["pairs_per_second"] < 900
    assert ours["peak_bytes"] > 100e6
    assert 0.9 < ours["useful_tflops"] / ours["real_tflops"] <= 1, "packs compute little more than is needed"
    assert found["hardware"]["matmul_tflops"]["fp32"] > ours["real_tflops"]
    assert "ratio" not in found["results"]
    assert found["hardware"]["device"]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("trl") is not None, reason="TRL is installed")
def test_without_trl_the_extra_is_named():
    done = bench(*TINY)
    assert done.returncode == 2
    assert "pip install 'dpo-pipeline[bench]'" in done.stderr


@pytest.mark.bench
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="the extra `bench` is not installed")
def test_both_compute_the_same_losses_before_they_race():
    done = bench(*TINY, "--set", "trl={precision: fp32, micro_batch_size: 2}")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["results"]["ratio"]["pairs_per_second"] > 0
