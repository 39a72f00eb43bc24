"""Computing the reference log-probs that a cache lacks, by one process or by all ranks of a machine.

`python -m dpo_core.reference.job --config job.json` is one rank; RANK, WORLD_SIZE and LOCAL_RANK say which,
as torchrun sets them. Ranks never talk: each does its own share of the sequences and adds shards of its own,
so there is no process group, no DeepSpeed, and a killed rank costs only what it had not yet kept.
"""

import argparse
import json
import logging
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydantic import Field

from dpo_core.config import Config
from dpo_core.data.tokens.tokenise import Sequence
from dpo_core.errors import DpoError, ModelError, StageFailed
from dpo_core.model_check import check_definition
from dpo_core.models.dropout import disable_dropout
from dpo_core.models.load import config_in, load_model
from dpo_core.models.remote_code import build, trust_digests, trusted
from dpo_core.reference.cache import ReferenceCache
from dpo_core.reference.compute import compute
from dpo_core.reference.keys import reference_facts, sequence_key, share
from dpo_core.reference.shard import LogpShard, ends
from dpo_core.scoring.logprobs import read_flops
from dpo_core.scoring.precision import Precision

log = logging.getLogger(__name__)

# Given the number of sequences to compute, gives the function that is told how many are done.
Progress = Callable[[int], Callable[[int], None]]


class ReferenceJob(Config):
    """What every rank is told."""

    model: str
    """Checkpoint folder of the reference."""
    attention: str
    """The attention implementation that the cache's key names."""
    sequences: str
    """File of the sequences to compute; see `write_sequences`."""
    cache: str
    """Folder of the reference's cache."""
    work: str
    """Folder for progress, errors and logs."""
    precision: Precision
    """fp32 or bf16."""
    token_budget: int = Field(4096, ge=1)
    """Tokens in one forward pass."""
    threads: int | None = Field(None, ge=1)
    """CPU threads a rank; all cores shared out when empty."""
    keep_seconds: float = Field(30.0, ge=0)
    """How much work a kill may cost a rank."""
    trusted_code: tuple[str, ...] = ()
    """sha256 of the Python files that ship with models and may run; see `remote_code`."""
    parent: int | None = None
    """Process that started the ranks; without it they end."""


@dataclass(frozen=True)
class ReferenceLogps:
    """The log-probs of some sequences, and how they came about."""

    shard: LogpShard
    attention: str
    sequences: int
    computed: int
    flops: float
    """Operations of what was computed."""


@dataclass(frozen=True)
class Reference:
    """The model whose log-probs are kept, and how they are computed: a cache's key."""

    model: Path
    """Checkpoint folder."""
    weights_sha256: str
    precision: Precision
    described: str
    """In words, for people who look at the cache; no part of the key."""


@dataclass(frozen=True)
class Resources:
    """Where log-probs are computed and kept: what decides the time and not the values."""

    caches: Path
    """The folder that holds one cache a reference."""
    work: Path
    """Scratch of this computation."""
    token_budget: int
    """Tokens in one forward pass."""
    processes: int = 1
    threads: int | None = None
    """CPU threads a process; all cores shared out when empty."""


def reference_logps(
    sequences: Seq[Sequence],
    reference: Reference,
    resources: Resources,
    progress: Progress = lambda total: lambda done: None,
) -> ReferenceLogps:
    """Log-probs of sequences, of which only those that no cache knows are computed.

    Raises:
        StageFailed: a rank failed; what was kept is not computed again.
    """
    wanted = {sequence_key(s): s for s in sequences}
    attention = attention_of(reference.model)
    facts = reference_facts(reference.weights_sha256, reference.precision, attention, reference.described)
    cache = ReferenceCache(resources.caches / facts.key, facts)
    known = cache.has(list(wanted))
    missing = [s for s, there in zip(wanted.values(), known, strict=True) if not there]
    tell = progress(len(missing))
    flops = 0.0
    if missing:
        job = ReferenceJob(
            model=str(reference.model),
            attention=attention,
            sequences=str(resources.work / "missing.npz"),
            cache=str(cache.folder),
            work=str(resources.work),
            precision=reference.precision,
            token_budget=resources.token_budget,
            threads=resources.threads,
            trusted_code=tuple(trusted()),
        )
        write_sequences(Path(job.sequences), missing)
        flops = run_ranks(job, resources.processes, tell)
        cache.reload()
    return ReferenceLogps(cache.select(list(wanted)), attention, len(wanted), len(missing), flops)


def attention_of(model: Path) -> str:
    """The attention implementation that `load_model` will use, without reading a weight.

    Raises:
        ModelError: not a checkpoint that transformers knows.
    """
    import torch

    try:
        with torch.device("meta"):
            built = build(config_in(model))
    except Exception as error:
        raise ModelError(f"the model in {model} cannot be built: {error}", "Run the import again") from error
    return str(built.config._attn_implementation)


def write_sequences(path: Path, sequences: Seq[Sequence]) -> None:
    """Sequences as flat arrays, for other processes."""
    np.savez(
        path,
        ids=np.array([i for s in sequences for i in s.prompt + s.completion], np.int64),
        prompts=np.array([len(s.prompt) for s in sequences], np.int64),
        lengths=np.array([len(s) for s in sequences], np.int64),
        masked=np.array([s.learnt is not None for s in sequences], bool),
        learnt=np.array([on for s in sequences for on in s.learnt or ()], bool),
    )


def read_sequences(path: Path) -> list[Sequence]:
    """What `write_sequences` wrote."""
    with np.load(path) as arrays:
        ids, prompts, lengths = arrays["ids"].tolist(), arrays["prompts"].tolist(), arrays["lengths"]
        masked, learnt = arrays["masked"].tolist(), iter(arrays["learnt"].tolist())
    begins = ends(lengths).tolist()
    return [
        Sequence(
            tuple(ids[begin : begin + prompt]),
            tuple(ids[begin + prompt : end]),
            learnt=tuple(islice(learnt, end - begin - prompt)) if has_mask else None,
        )
        for begin, prompt, end, has_mask in zip(begins, prompts, begins[1:], masked, strict=False)
    ]


def run_ranks(job: ReferenceJob, processes: int, progress: Callable[[int], None]) -> float:
    """Compute the job's sequences: here where one process on CPUs does it, else in a child process a rank.

    Returns the operations that it took.

    A GPU is only ever used by children: what this process took of its memory the trainer would lack.
    """
    import torch

    if processes == 1 and not torch.cuda.is_available():
        return run_rank(job, 0, 1, progress).flops
    work = Path(job.work)
    for stale in [*work.glob("progress-*"), *work.glob("computed-*.json"), *work.glob("error-*.json")]:
        stale.unlink()
    path = work / "reference-job.json"
    path.write_text(job.model_copy(update={"parent": os.getpid()}).model_dump_json(indent=1))
    ranks: list[subprocess.Popen[bytes]] = []
    failed: list[int] = []
    try:
        for rank in range(processes):
            ranks.append(_start_rank(path, work, rank, processes))
        while not failed and any(process.poll() is None for process in ranks):
            progress(_done(work))
            time.sleep(0.2)
            failed = [number for number, process in enumerate(ranks) if process.poll()]
    finally:
        for process in ranks:
            process.kill()  # shards appear whole or not at all
            process.wait()
    failed = failed or [number for number, process in enumerate(ranks) if process.returncode]
    if failed:
        raise _error_of(work, failed[0], ranks[failed[0]].returncode)
    progress(_done(work))
    return sum(json.loads(path.read_text())["flops"] for path in work.glob("computed-*.json"))


def _start_rank(path: Path, work: Path, rank: int, world: int) -> subprocess.Popen[bytes]:
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    command = [sys.executable, "-P", "-m", "dpo_core.reference.job", "--config", str(path)]
    with (work / f"rank-{rank}.log").open("wb") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | place)


def _done(work: Path) -> int:
    return sum(int(path.read_text()) for path in work.glob("progress-*"))


def _error_of(work: Path, rank: int, status: int) -> DpoError:
    try:
        left = json.loads((work / f"error-{rank}.json").read_text())
    except (OSError, ValueError):
        return StageFailed(
            f"rank {rank} of the reference log-probs died (status {status}); its log is "
            f"{work / f'rank-{rank}.log'}",
            "If it ran out of memory, lower cache.token_budget and start it again without --resume: finished "
            "stages are not run again",
        )
    error = StageFailed(left["problem"], left["remedy"])
    error.exit_code = int(left["exit_code"])
    return error


class Computed(NamedTuple):
    """What a rank did."""

    sequences: int
    flops: float


def run_rank(job: ReferenceJob, rank: int, world: int, progress: Callable[[int], None]) -> Computed:
    """Compute and keep one rank's share of what the cache lacks.

    Raises:
        StageFailed: a log-prob is not finite, or the model does not run as the cache's key says.
        ModelError: the model's log-probs cannot be computed from its trunk and head.
    """
    import torch

    cache = ReferenceCache(Path(job.cache))
    mine = share(read_sequences(Path(job.sequences)), rank, world)
    known = cache.has([sequence_key(s) for s in mine])
    missing = [s for s, there in zip(mine, known, strict=True) if not there]
    if not missing:
        return Computed(0, 0.0)
    trust_digests(job.trusted_code)
    model = load_model(Path(job.model))
    if model.config._attn_implementation != job.attention:
        raise StageFailed(
            f"the reference runs with {model.config._attn_implementation} attention, not {job.attention}",
            "Run the cache stage again",
        )
    disable_dropout(model)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        # As in training, where torch 2.13's cuDNN attention gives NaN gradients in bf16.
        torch.backends.cuda.enable_cudnn_sdp(False)
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    model.to(device)
    check_definition(model)
    compute(
        model,
        missing,
        precision=job.precision,
        token_budget=job.token_budget,
        keep=cache.add,
        progress=progress,
        keep_seconds=job.keep_seconds,
    )
    return Computed(len(missing), read_flops(model, missing, job.token_budget))


def main(argv: list[str] | None = None) -> int:
    """Entry point of one rank. Exit status: 0 done, else that of the error it leaves in the work folder."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="the job file (JSON)")
    job = ReferenceJob.model_validate_json(Path(parser.parse_args(argv).config).read_bytes())
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    torch.set_num_threads(job.threads or max(1, (os.cpu_count() or 1) // world))
    work = Path(job.work)

    def progress(done: int) -> None:
        unread = work / f"new-progress-{rank}"
        unread.write_text(str(done))
        os.replace(unread, work / f"progress-{rank}")  # never read half, or the bar would fall back
        if job.parent is not None and os.getppid() != job.parent:
            raise StageFailed("the process that started this rank is gone", "Resume the run")

    try:
        done = run_rank(job, rank, world, progress)
        (work / f"computed-{rank}.json").write_text(json.dumps(done._asdict()))
        log.info("rank %d of %d computed %d sequences", rank, world, done.sequences)
    except Exception as error:
        traceback.print_exc()
        expected = isinstance(error, DpoError)
        left = (
            error if expected else StageFailed(f"{type(error).__name__}: {error}", "Look at the rank's log")
        )
        facts = {"problem": left.problem, "remedy": left.remedy, "exit_code": left.exit_code}  # type: ignore[attr-defined]
        (work / f"error-{rank}.json").write_text(json.dumps(facts))
        return left.exit_code  # type: ignore[attr-defined]
    return 0


if __name__ == "__main__":
    sys.exit(main())
