"""The cache job: two ranks give the log-probs of one, and a killed rank loses only what it had not saved."""

import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from dpo_core.data.tokens.config import TokenConfig
from dpo_core.jobs.files import ReferenceJob, write_job
from dpo_core.models.source import weights_digest
from dpo_core.reference.shard import LogpShard
from tests.support.models.tiny import make_tiny_model
from tests.support.runs import forked
from tests.support.runs.jobs import on, run_job_file
from tests.support.runs.training_jobs import wait_until


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def job(place: Path, model: Path, processes: int, rows: int = 60, budget: int = 64) -> ReferenceJob:
    """Small passes, each kept at once."""
    place.mkdir(exist_ok=True)
    listed = [
        {
            "id": f"row-{i}",
            "prompt": f"The soup of day {i} was",
            "chat": False,
            "chosen": f" good on day {i} and warm.",
            "rejected": f" cold, {i} times.",
            "chosen_ended": True,
            "rejected_ended": True,
        }
        for i in range(rows)
    ]
    pd.DataFrame(listed).to_parquet(place / "rows.parquet", index=False)
    return ReferenceJob(
        **on(place / "work", processes),
        model=str(model),
        weights_sha256=weights_digest(model),
        described="tiny",
        rows=str(place / "rows.parquet"),
        method="dpo",
        settings={"engine": {"precision": "fp32"}},
        tokens=TokenConfig(max_length=64, max_prompt_length=24),
        caches=str(place / "caches"),
        out=str(place / "out"),
        token_budget=budget,
        keep_seconds=0.0,
    )


def values(done: ReferenceJob) -> Any:
    shard = LogpShard.open(Path(done.out))
    return shard.keys_N2, shard.offsets, shard.values


def assert_same(one: ReferenceJob, other: ReferenceJob) -> None:
    for a, b in zip(values(one), values(other), strict=True):
        np.testing.assert_array_equal(a, b)


def test_two_ranks_give_the_log_probs_of_one(model: Path, tmp_path: Path) -> None:
    alone, two = job(tmp_path / "alone", model, 1), job(tmp_path / "two", model, 2)
    result = run_job_file(alone)
    assert result["computed"] == result["sequences"] == 120
    assert run_job_file(two) == result
    assert_same(alone, two)
    # A second job finds all of them in the cache.
    again = two.model_copy(update={"work": str(tmp_path / "again"), "out": str(tmp_path / "again-out")})
    assert run_job_file(again) == result | {"computed": 0, "flops": 0.0}
    assert_same(alone, again)


def test_a_killed_rank_loses_only_what_it_had_not_saved(model: Path, tmp_path: Path) -> None:
    alone = job(tmp_path / "alone", model, 1, budget=32)
    result = run_job_file(alone)
    killed = job(tmp_path / "killed", model, 2, budget=32)
    caches = Path(killed.caches)
    started = forked.start_ranks(write_job(killed), 2)
    wait_until(lambda: len(list(caches.glob("*/shard-*"))) >= 4, "some shards")
    started[1].kill()
    started[0].terminate()  # as torchrun does when another rank dies
    for process in started:
        process.join()
    assert started[1].exitcode == -signal.SIGKILL
    assert started[0].exitcode != 0
    kept = {shard.name: (shard / "keys.npy").stat().st_mtime_ns for shard in caches.glob("*/shard-*")}
    assert len(kept) >= 4
    began = time.time_ns()
    assert run_job_file(killed) == result
    assert_same(alone, killed)
    shards = [LogpShard.open(shard) for shard in caches.glob("*/shard-*")]
    assert sum(len(shard) for shard in shards) == 120, "no log-prob was computed twice"
    assert all(born < began for born in kept.values())
