"""A training job: its rows, its file, its curves, and the facts of what it wrote."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from dpo_core.data.tokens.tokenise import TokenConfig
from dpo_core.methods.job import Job
from dpo_core.methods.method import Method
from dpo_core.models.remote_code import trusted
from dpo_core.models.source import parameter_count, weights_digest
from tasks.stages.base import Output, Work
from tasks.stages.job import run_job
from tasks.store.facts import TrainingFacts
from tasks.store.manifest import Manifest


@dataclass(frozen=True)
class Run:
    """What a training is given beside its own files: the method with its settings, and how text is read."""

    method: Method
    settings: Any
    tokens: TokenConfig
    seed: int


def settings_of(run: Run) -> dict[str, Any]:
    """What every training's key holds of the recipe."""
    return {
        "config": run.settings.model_dump(mode="json") | dict(run.method.retired),
        "tokens": run.tokens.model_dump(mode="json"),
        "seed": run.seed,
    }


def split_to(
    data: Manifest,
    split: str,
    path: Path,
    *,
    distinct: list[str] | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> int:
    """Write one side of a split for the job, or a seeded choice of its rows; returns how many."""
    frame = rows_of(data, split, limit=limit, seed=seed)
    if distinct:
        frame = frame.drop_duplicates(distinct)[distinct]
    frame.to_parquet(path, index=False)
    return len(frame)


def rows_of(data: Manifest, split: str, *, limit: int | None = None, seed: int = 0) -> pd.DataFrame:
    """One side of a split, or a seeded choice of its rows."""
    frame = pd.read_parquet(data.path / "data.parquet")
    frame = frame[frame["split"] == split]
    return frame if limit is None or len(frame) <= limit else frame.sample(limit, random_state=seed)


def train(given: Work, run: Run, job: dict[str, Any], rows: int) -> Output:
    """Run one training job to its end, streaming its metrics, and describe what it wrote.

    Args:
        job: fields of `dpo_core.methods.job.Job` that this training alone has.
        rows: how many it learns from.
    """
    out = given.scratch / "out"
    curve_file, offset = given.scratch / "metrics.jsonl", 0
    bar = given.progress(run.method.total_steps(run.settings, rows))

    def look() -> None:
        """The curves reach MLflow while the job runs."""
        nonlocal offset
        offset = given.mlflow.metrics_from_jsonl(curve_file, offset)
        if curve_file.exists():
            bar.update(curve_file.read_bytes().count(b"\n"))

    file = Job(
        method=run.method.name,
        settings=run.settings.model_dump(mode="json"),
        tokens=run.tokens,
        seed=run.seed,
        out=str(out),
        work=str(given.scratch),
        trusted_code=tuple(trusted()),
        **job,
    )
    result = run_job(given, file, run.settings.engine.processes, look)
    lines = curve_file.read_text().splitlines()
    curve = [json.loads(line) for line in lines]
    (out / "metrics.jsonl").write_text("".join(json.dumps(_timeless(row)) + "\n" for row in curve))
    facts = TrainingFacts(
        steps=len(curve),
        tokens_trained=sum(row.get("num_tokens", 0.0) for row in curve),
        weights_sha256=weights_digest(out) if (out / "config.json").exists() else None,
        final={k: v for k, v in result["metrics"].items() if isinstance(v, float)},
        flops=result["flops"],
        peak_memory_bytes=result["peak_memory_bytes"],
        seconds=sum(row.get("seconds_per_step", 0.0) for row in curve),
    )
    costs = {f"cost/{name}": float(result[name]) for name in ("flops", "peak_memory_bytes")}
    return Output(out, parameters=parameter_count(out), facts=facts, metrics=costs)


def _timeless(row: dict[str, float]) -> dict[str, float]:
    """A line of the curve without clock times, so that the same training gives the same artifact."""
    return {k: v for k, v in row.items() if k not in {"time", "seconds_per_step", "tokens_per_second"}}
