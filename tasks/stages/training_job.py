"""Run a training job of a stage: write its rows and its file, follow its metrics, describe its output."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from dpo_core.data.tokens.config import TokenConfig
from dpo_core.methods.job import Job
from dpo_core.methods.method import Method
from dpo_core.models.folder import is_denoiser
from dpo_core.models.remote_code import trusted_digests
from dpo_core.models.source import parameter_count, weights_digest
from tasks.stages.base import Output, RunningStage
from tasks.stages.job import run_job
from tasks.store.facts import TrainingFacts
from tasks.store.manifest import Manifest


@dataclass(frozen=True)
class TrainingSetup:
    """Everything that decides a training apart from its data and models."""

    method: Method
    settings: Any
    tokens: TokenConfig
    seed: int


def key_settings_of(setup: TrainingSetup) -> dict[str, Any]:
    """The part of the recipe that belongs to the key of every training."""
    return {
        "config": setup.settings.model_dump(mode="json") | dict(setup.method.retired),
        "tokens": setup.tokens.model_dump(mode="json"),
        "seed": setup.seed,
    }


def write_split(
    data: Manifest,
    split: str,
    path: Path,
    *,
    distinct: list[str] | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> int:
    """Write the rows of `split_rows` to a file for the job; returns their number.

    Args:
        distinct: columns to keep, beside what the data say of images, with duplicate rows removed.
    """
    frame = split_rows(data, split, limit=limit, seed=seed)
    if distinct:
        kept = [*distinct, *(["metadata"] if "metadata" in frame else [])]
        frame = frame.drop_duplicates(distinct)[kept]
    frame.to_parquet(path, index=False)
    return len(frame)


def split_rows(data: Manifest, split: str, *, limit: int | None = None, seed: int = 0) -> pd.DataFrame:
    """The rows of one side of the split, train or eval; a seeded sample of them where they exceed `limit`."""
    frame = pd.read_parquet(data.path / "data.parquet")
    frame = frame[frame["split"] == split]
    return frame if limit is None or len(frame) <= limit else frame.sample(limit, random_state=seed)


def train(running: RunningStage, setup: TrainingSetup, job: dict[str, Any], rows: int) -> Output:
    """Run one training job to its end, stream its metrics, and describe its output.

    Args:
        job: further fields of `dpo_core.methods.job.Job`.
        rows: the number of training rows.
    """
    out = running.scratch / "out"
    curve_file, offset = running.scratch / "metrics.jsonl", 0
    bar = running.progress(setup.method.total_steps(setup.settings, rows))

    def on_poll() -> None:
        nonlocal offset
        offset = running.mlflow.metrics_from_jsonl(curve_file, offset)
        if curve_file.exists():
            bar.update(curve_file.read_bytes().count(b"\n"))

    file = Job(
        method=setup.method.name,
        settings=setup.settings.model_dump(mode="json"),
        tokens=setup.tokens,
        seed=setup.seed,
        out=str(out),
        work=str(running.scratch),
        trusted_code=tuple(trusted_digests()),
        **job,
    )
    result = run_job(running, file, setup.settings.engine.processes, on_poll)
    lines = curve_file.read_text().splitlines()
    curve = [json.loads(line) for line in lines]
    (out / "metrics.jsonl").write_text("".join(json.dumps(_without_times(row)) + "\n" for row in curve))
    facts = TrainingFacts(
        steps=len(curve),
        tokens_trained=sum(row.get("num_tokens", 0.0) for row in curve),
        weights_sha256=weights_digest(out) if (out / "config.json").exists() or is_denoiser(out) else None,
        final={k: v for k, v in result["metrics"].items() if isinstance(v, float)},
        flops=result["flops"],
        peak_memory_bytes=result["peak_memory_bytes"],
        seconds=sum(row.get("seconds_per_step", 0.0) for row in curve),
    )
    costs = {f"cost/{name}": float(result[name]) for name in ("flops", "peak_memory_bytes")}
    return Output(out, parameters=parameter_count(out), facts=facts, metrics=costs)


def _without_times(row: dict[str, float]) -> dict[str, float]:
    """A line of the curve without times, so that the same training gives the same artifact."""
    return {k: v for k, v in row.items() if k not in {"time", "seconds_per_step", "tokens_per_second"}}
