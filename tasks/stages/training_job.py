"""One training job: written, given to the launcher, watched to its end; its error told as a stage's."""

import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from deploy.launchers import Launcher, State, launcher_of
from dpo_core.data.tokens.tokenise import TokenConfig
from dpo_core.errors import DpoError, StageFailed
from dpo_core.methods.method import Method
from dpo_core.models.load import parameter_count, weights_digest
from dpo_core.models.remote_code import trusted
from tasks.stages.base import Output, Progress, Work
from tasks.store.facts import TrainingFacts
from tasks.store.files import disk_fault
from tasks.store.manifest import Manifest

log = logging.getLogger("dpo")

_LESS_MEMORY = (
    "Give it more memory, or lower its micro_batch_size (pack_tokens where it packs) or engine.processes, or "
    "set engine.gradient_checkpointing=true (dpo plan tells what it needs), and start the run again without "
    "--resume: finished stages are not run again"
)


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
    processes = run.settings.engine.processes
    shared = {
        "method": run.method.name,
        "settings": run.settings.model_dump(mode="json"),
        "tokens": run.tokens.model_dump(mode="json"),
        "seed": run.seed,
        "out": str(out),
        "work": str(given.scratch),
        "trusted_code": trusted(),
    }
    path = given.scratch / "job.json"
    path.write_text(json.dumps(job | shared, indent=1))
    # The folder is the training's own: its stage, settings and data.
    launcher = launcher_of(given.context.cluster, f"{given.name} {given.scratch}", given.context.stop.hurry)
    given.mlflow.tag("dpo.command", launcher.render(path, processes))
    _watch(given, launcher, path, processes, given.progress(run.method.total_steps(run.settings, rows)))
    result = json.loads((given.scratch / "result.json").read_text())
    lines = (given.scratch / "metrics.jsonl").read_text().splitlines()
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


def _watch(given: Work, launcher: Launcher, path: Path, processes: int, bar: Progress) -> None:
    """Wait for the job; its curves reach MLflow while it runs. Whatever ends the wait ends the job too."""
    curve, offset = given.scratch / "metrics.jsonl", 0
    handle = launcher.submit(path, processes, given.scratch)
    try:
        while True:
            given.context.stop.check()
            state = launcher.poll(handle)
            offset = given.mlflow.metrics_from_jsonl(curve, offset)
            if curve.exists():
                bar.update(curve.read_bytes().count(b"\n"))
            if state is not State.RUNNING:
                break
            time.sleep(launcher.pause)
        why = launcher.why(handle) if state is State.FAILED else ""
    except BaseException as error:
        given.context.stop.begin(error)
        raise
    finally:
        launcher.cancel(handle)
        given.mlflow.artifact(given.scratch / "train.log", "logs")
    if state is not State.DONE:
        raise _error_of(given, launcher.logs(handle), state, why)


def _error_of(given: Work, tail: str, state: State, why: str) -> DpoError:
    """The error that the job left, as the class its exit code stands for."""
    name = given.name
    if state is State.STOPPED:
        return StageFailed(f"{name} was stopped and saved its state", "Resume the run")
    if _short_of_memory(why):  # the other ranks have only missed the one that was killed
        return StageFailed(f"{name} failed: {why}", _LESS_MEMORY)
    try:
        left = json.loads((given.scratch / "error.json").read_text())
    except (OSError, ValueError):
        return _without_word(given, tail, why)
    if fault := disk_fault(left["problem"], given.scratch, f"stage {name}"):
        return fault
    remedy = _LESS_MEMORY if _short_of_memory(left["problem"]) else left["remedy"]
    error = StageFailed(f"{name}: {left['problem']}", remedy)
    error.exit_code = int(left["exit_code"])
    return error


def _without_word(given: Work, tail: str, why: str) -> DpoError:
    """The error of a job that left none."""
    name = given.name
    if fault := disk_fault(tail, given.scratch, f"stage {name}"):
        return fault
    if why:
        return StageFailed(f"{name} failed: {why}", "Mend that, then resume the run")
    log.error("the end of the log of %s:\n%s", name, tail)
    return StageFailed(
        f"{name} died without a word; its log is {given.scratch / 'train.log'}",
        f"If it ran out of memory: {_LESS_MEMORY}",
    )


def _short_of_memory(said: str) -> bool:
    """Whether a platform's word, or a library's (torch on GPU and CPU, Python), means too little memory."""
    said = said.lower()
    return any(words in said for words in ("out of memory", "can't allocate memory", "memoryerror"))
