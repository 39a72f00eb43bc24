"""Job files of the real training entry point, and ways to run them."""

import json
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pandas as pd

from deploy.launchers.base import State, clear, final_state, tail
from dpo_core.data.tokens.config import TokenConfig
from dpo_core.data.tokens.sequences import TokenPair, TokenSequence
from dpo_core.data.tokens.tokenise import Tokenise
from dpo_core.examples.unpaired import UnpairedExample, mismatched, unpaired_examples
from dpo_core.methods.job import Job
from dpo_core.methods.registry import get
from dpo_core.models.load import load_model, load_tokenizer
from dpo_core.reference import LogpShard, sequence_key
from dpo_core.reference.compute import compute
from tests.support.runs import forked

PATIENCE = 600.0
"""Seconds that anything may take on a shared machine; what is over sooner costs nothing."""
_TIMES = {"time", "seconds_per_step", "tokens_per_second"}
TOKENS = TokenConfig(max_length=64, max_prompt_length=32)
WORDS = "the film was long and quiet but bread is good warm cold sad happy love it very boring".split()  # noqa: SIM905


def text(seed: int, words: int) -> str:
    """Some words, the same for the same seed."""
    return " ".join(WORDS[(seed * 7 + i * (seed % 5 + 1)) % len(WORDS)] for i in range(words))


def pair_rows(count: int = 16) -> list[dict[str, Any]]:
    """Pairs of very unequal lengths; some answers are cut and carry no end-of-sequence token."""
    return [
        {
            "id": f"pair-{i}",
            "prompt": text(i, 2 + i % 4),
            "chat": False,
            "chosen": " " + text(i + 100, 2 + i % 7),
            "rejected": " " + text(i + 200, 9 - i % 8),
            "chosen_ended": True,
            "rejected_ended": i % 3 > 0,
        }
        for i in range(count)
    ]


def unpaired_rows(count: int = 12) -> list[dict[str, Any]]:
    """Labelled completions of very unequal lengths; two of three are desirable."""
    return [
        {
            "id": f"row-{i}",
            "prompt": text(i, 2 + i % 4),
            "chat": False,
            "completion": " " + text(i + 100, 2 + 2 * i % 9),
            "label": i % 3 > 0,
            "ended": i % 4 > 0,
        }
        for i in range(count)
    ]


def token_examples(model: Path, rows: list[dict[str, Any]]) -> list[UnpairedExample]:
    """Unpaired rows, or pairs taken apart, as the training job sees them."""
    kept, dropped = unpaired_examples(Tokenise(load_tokenizer(model), TOKENS), rows)
    assert not dropped
    return kept


def token_pairs(model: Path, rows: list[dict[str, Any]]) -> list[TokenPair]:
    """The rows as the training job sees them."""
    kept, dropped = Tokenise(load_tokenizer(model), TOKENS).pairs(rows)
    assert not dropped
    return kept


def write_reference(model: Path, rows: list[dict[str, Any]], folder: Path) -> Path:
    """A shard of the fp32 reference log-probs of both sides of every row."""
    return _write(
        model, [s for pair in token_pairs(model, rows) for s in (pair.chosen, pair.rejected)], folder
    )


def write_unpaired_reference(model: Path, rows: list[dict[str, Any]], folder: Path) -> Path:
    """A shard of the fp32 reference log-probs of every completion and of every mismatched pair."""
    examples = token_examples(model, rows)
    return _write(model, [e.sequence for e in examples] + mismatched(examples), folder)


def _write(model: Path, sequences: list[TokenSequence], folder: Path) -> Path:
    entries: dict[bytes, Any] = {}
    compute(load_model(model), sequences, precision="fp32", token_budget=256, save=entries.update)
    LogpShard.build(entries).save(folder)
    return folder


def write_job(folder: Path, method: str, model: Path, rows: list[dict[str, Any]], **fields: Any) -> Path:
    """A job file in `folder`, which becomes its work folder; `fields` are those of the job."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "rows.parquet"
    pd.DataFrame(rows).to_parquet(data, index=False)
    job = {
        "method": method,
        "settings": {},
        "model": str(model),
        "data": str(data),
        "out": str(folder / "out"),
        "work": str(folder),
        "tokens": TOKENS.model_dump(mode="json"),
        "seed": 3,
    }
    path = folder / "job.json"
    path.write_text(json.dumps(job | fields))
    return path


def build_trainer(job: Path) -> Any:
    """The trainer of a job file, in this process."""
    parsed = Job.model_validate(json.loads(job.read_text()))
    method = get(parsed.method)
    build = import_module(f"dpo_core.trainers.{parsed.method}").build
    trainer, _ = build(parsed, method.settings.model_validate(parsed.settings))
    return trainer


def demonstrations(pairs: list[dict[str, Any]], side: str = "rejected") -> list[dict[str, Any]]:
    """One side of each pair, as a row of SFT."""
    return [
        {"id": r["id"], "prompt": r["prompt"], "chat": False, "completion": r[side], "ended": True}
        for r in pairs
    ]


def sft_job(folder: Path, model: Path, epochs: int = 1) -> Path:
    """A job of four steps an epoch on one process a node."""
    rows = demonstrations(pair_rows(16), "chosen")
    engine = {"precision": "fp32", "save_every": 2, "threads": 1}
    return write_job(
        folder, "sft", model, rows, settings={"epochs": epochs, "batch_size": 4, "engine": engine}
    )


def curve(work: Path) -> list[dict[str, float]]:
    """The lines of a job's metrics.jsonl; half a line at the end is left out."""
    path = work / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def timeless(work: Path) -> list[dict[str, float]]:
    """The curve without clock times."""
    return [{k: v for k, v in line.items() if k not in _TIMES} for line in curve(work)]


def spoil(shard: Path, pairs: list[TokenPair], bad: TokenPair, folder: Path) -> Path:
    """A copy of the reference log-probs of some pairs, in which a chosen answer has a value that is nan."""
    good = LogpShard.open(shard)
    keys = [sequence_key(s) for p in pairs for s in (p.chosen, p.rejected)]
    entries = {k: good.tokens(int(i)).copy() for k, i in zip(keys, good.positions(keys), strict=True)}
    entries[sequence_key(bad.chosen)][0] = float("nan")
    LogpShard.build(entries).save(folder)
    return folder


def wait_until(ready: Callable[[], bool], what: str, seconds: float = PATIENCE) -> None:
    """Poll until something holds."""
    limit = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < limit, f"{what} did not happen in {seconds:g} s"
        time.sleep(0.005)


def launch(job: Path, processes: int = 1) -> State:
    """Run a job to its end, as the launcher of this machine does."""
    clear(job.parent)
    forked.ranks(job, processes)
    state = final_state(job.parent)
    assert state is not State.FAILED, tail(job.parent, 40)
    return state
