"""Jobs of one rank: with more ranks, and restarted after a kill, they write the same."""

import json
import signal
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from deploy.launchers.base import tail
from dpo_core.data.tokens.config import TokenConfig
from dpo_core.jobs.files import CompareTokensJob, ImportJob, ModelJob, write_job
from dpo_core.models.config import ModelConfig
from expectations.config import GateConfig
from expectations.job_file import GateJob
from tasks.store.manifest import digest_folder
from tests.support.models.tiny import make_tiny_model
from tests.support.runs import forked
from tests.support.runs.jobs import on, run_job_file
from tests.support.runs.training_jobs import pair_rows


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("rows") / "data.parquet"
    from dpo_core.data.layouts.fields import PairFields
    from dpo_core.data.records import to_frame

    pairs = [
        PairFields(row["prompt"], False, row["chosen"], row["rejected"], rejected_ended=row["rejected_ended"])
        for row in pair_rows(24)
    ]
    frame = to_frame(pairs, "pairs", list(range(24)))
    sides = ["eval" if number % 3 == 0 else "train" for number in range(24)]
    frame.assign(split=pd.array(sides, dtype="string[pyarrow]")).to_parquet(path, index=False)
    return str(path)


def import_job(place: Path, model: Path, processes: int) -> ImportJob:
    return ImportJob(
        **on(place / "work", processes),
        model=ModelConfig(name=str(model)),
        out=str(place / "out"),
        longest=64,
        precision="fp32",
    )


def gate_job(place: Path, model: Path, rows: str, processes: int) -> GateJob:
    return GateJob(
        **on(place / "work", processes),
        subject="pairs",
        rows=rows,
        model=str(model),
        config=GateConfig(quarantine="drop"),
        tokens=TokenConfig(max_length=64, max_prompt_length=24),
        docs=str(place / "docs"),
        out=str(place / "data.parquet"),
    )


def killed_at_its_start(job: ModelJob, sign: str) -> None:
    """Run a job and kill it as soon as its log or its folders show that it works."""
    path = write_job(job)
    (process,) = forked.start_ranks(path, 1)
    while not list(path.parents[1].glob(sign)):
        assert process.exitcode is None, tail(path.parent, 40)
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_a_model_is_imported_once_whatever_the_number_of_ranks(model: Path, tmp_path: Path) -> None:
    alone = run_job_file(import_job(tmp_path / "alone", model, 1))
    assert alone["layout"] in ("packed", "padded")
    assert run_job_file(import_job(tmp_path / "two", model, 2)) == alone
    digest = digest_folder(tmp_path / "alone" / "out")
    assert digest_folder(tmp_path / "two" / "out") == digest
    (tmp_path / "killed").mkdir()
    killed = import_job(tmp_path / "killed", model, 1)
    killed_at_its_start(killed, "out/*")
    assert run_job_file(killed) == alone
    assert digest_folder(tmp_path / "killed" / "out") == digest


def test_data_are_judged_once_whatever_the_number_of_ranks(model: Path, rows: str, tmp_path: Path) -> None:
    def judged(result: dict[str, Any]) -> dict[str, Any]:
        result["report"].pop("docs_index")
        return json.loads(json.dumps(result))

    alone = judged(run_job_file(gate_job(tmp_path / "alone", model, rows, 1)))
    assert alone["rows"] == 24 - alone["report"]["dropped"]
    kept = pd.read_parquet(tmp_path / "alone" / "data.parquet")
    assert alone["sides"] == kept["split"].value_counts().to_dict()
    assert judged(run_job_file(gate_job(tmp_path / "two", model, rows, 2))) == alone
    (tmp_path / "killed").mkdir()
    killed = gate_job(tmp_path / "killed", model, rows, 1)
    killed_at_its_start(killed, "docs/*")
    assert judged(run_job_file(killed)) == alone
    for name in ("two", "killed"):
        pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / name / "data.parquet"), kept)


def test_tokens_are_compared_once_whatever_the_number_of_ranks(model: Path, tmp_path: Path) -> None:
    job = CompareTokensJob(**on(tmp_path / "work", 2), model=str(model), other=str(model))
    assert run_job_file(job) == {"differing": []}


def test_an_unknown_kind_of_job_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "job.json"
    path.write_text(json.dumps({"kind": "sculpt", "work": str(tmp_path)}))
    assert forked.ranks(path, 1) == [4]
    error = json.loads((tmp_path / "error.json").read_text())
    assert error["problem"].startswith("there is no kind of job 'sculpt', only ")
    assert "evaluate" in error["problem"]
    assert "same version" in error["remedy"]
