"""The cache as a product: what makes it compute, what does not, and all ranks with one of them killed."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dpo_core.data.tokens.tokenise import Sequence, TokenConfig, Tokenise, TokenPair
from dpo_core.errors import StageFailed
from dpo_core.models.load import load_model, load_tokenizer, weights_digest
from dpo_core.reference import ReferenceCache, reference_facts, sequence_key, share
from dpo_core.reference.cache import read_facts, shard_folders
from dpo_core.reference.job import (
    Reference,
    ReferenceJob,
    ReferenceLogps,
    Resources,
    attention_of,
    read_sequences,
    reference_logps,
    run_ranks,
    write_sequences,
)
from dpo_core.reference.shard import LogpShard
from tests.support.models.logps import full_logps, random_sequences

REPOSITORY = Path(__file__).resolve().parents[3]
CHAT = json.dumps([{"role": "user", "content": "How was the soup by the sea?"}])
ROWS = [
    {
        "id": f"row-{i}",
        "prompt": CHAT if i % 2 else f"The soup of day {i} was",
        "chat": bool(i % 2),
        "chosen": f" good on day {i} and warm, and the bread of the house was good.",
        "rejected": f" cold, {i} times.",
        "chosen_ended": True,
        "rejected_ended": True,
    }
    for i in range(12)
]
TOKENS = {"max_length": 64, "max_prompt_length": 24}


@pytest.fixture
def forwards() -> Iterator[list[str]]:
    """One entry for each forward pass of a language model in this process."""
    seen: list[str] = []

    def count(module: Any, given: Any) -> None:
        if type(module).__name__ == "LlamaModel":
            seen.append("forward")

    handle = torch.nn.modules.module.register_module_forward_pre_hook(count)
    yield seen
    handle.remove()


def token_pairs(model: Path, rows: list[dict[str, Any]], **tokens: Any) -> list[TokenPair]:
    return Tokenise(load_tokenizer(model), TokenConfig(**(TOKENS | tokens))).pairs(rows)[0]


def cached(pairs: list[TokenPair], model: Path, folder: Path, precision: Any = "fp32") -> ReferenceLogps:
    work = folder / "work"
    work.mkdir(parents=True, exist_ok=True)
    return reference_logps(
        [s for p in pairs for s in (p.chosen, p.rejected)],
        Reference(model, weights_digest(model), precision, "tiny"),
        Resources(folder / "caches", work, token_budget=256),
    )


def changed_weight(model: Path, folder: Path) -> Path:
    """The model with another value in one weight."""
    from safetensors.torch import load_file, save_file

    copy = shutil.copytree(model, folder)
    weights = load_file(copy / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][3, 5] += 0.5
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def with_other_template(model: Path, folder: Path) -> Path:
    """The model with another chat template."""
    copy = shutil.copytree(model, folder)
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        file = copy / name
        if file.exists():
            file.write_text(file.read_text().replace("<|", "<!"))
    return copy


def one_other_word(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [rows[0] | {"chosen": rows[0]["chosen"].replace("warm", "hot")}, *rows[1:]]


SEQUENCES = 2 * len(ROWS)


def test_a_repeated_computation_computes_nothing(tiny: Path, tmp_path: Path, forwards: list[str]) -> None:
    pairs = token_pairs(tiny, ROWS)
    first = cached(pairs, tiny, tmp_path)
    assert (first.sequences, first.computed) == (SEQUENCES, SEQUENCES)
    assert forwards, "the counter counts"
    forwards.clear()
    # Other scratch, other order, part of the data: the same entries.
    shutil.rmtree(tmp_path / "work")
    again = cached(pairs[::-1][:7], tiny, tmp_path)
    assert (again.sequences, again.computed) == (14, 0)
    assert not forwards
    keys = [sequence_key(p.chosen) for p in pairs[-7:]]
    np.testing.assert_array_equal(again.shard.sums(keys), first.shard.sums(keys))


CHANGES: dict[str, tuple[Any, int]] = {
    # What is changed, and how many of the 24 sequences it touches.
    "a weight": ({"model": changed_weight}, SEQUENCES),
    "the precision": ({"precision": "bf16"}, SEQUENCES),
    "the chat template": ({"model": with_other_template}, SEQUENCES // 2),
    "how turns are written": ({"tokens": {"template": "transcript"}}, SEQUENCES // 2),
    "the longest row": ({"tokens": {"max_length": 40}}, 12),
    "one word of one answer": ({"rows": one_other_word}, 1),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_decides_a_log_prob_is_computed_anew(
    tiny: Path, tmp_path: Path, what: str, forwards: list[str]
) -> None:
    change, touched = CHANGES[what]
    before = cached(token_pairs(tiny, ROWS), tiny, tmp_path / "used")
    model = change["model"](tiny, tmp_path / "other") if "model" in change else tiny
    rows = change["rows"](ROWS) if "rows" in change else ROWS
    pairs = token_pairs(model, rows, **change.get("tokens", {}))
    precision = change.get("precision", "fp32")
    forwards.clear()
    now = cached(pairs, model, tmp_path / "used", precision)
    assert now.computed == touched
    assert forwards
    fresh = cached(pairs, model, tmp_path / "empty", precision)
    assert fresh.computed == SEQUENCES
    keys = [sequence_key(s) for p in pairs for s in (p.chosen, p.rejected)]
    if touched == SEQUENCES:
        np.testing.assert_array_equal(now.shard.sums(keys), fresh.shard.sums(keys))
        # The same tokens have other values: an old value would not have gone unseen.
        assert (now.shard.sums(keys) != before.shard.sums(keys)).all()
    else:
        # In other batches, so not to the last bit.
        np.testing.assert_allclose(now.shard.sums(keys), fresh.shard.sums(keys), rtol=0, atol=1e-4)


def test_damage_is_found_named_and_computed_again(
    tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pairs = token_pairs(tiny, ROWS)
    cached(pairs[:6], tiny, tmp_path)
    first = cached(pairs, tiny, tmp_path)
    assert first.computed == 12
    cache = next((tmp_path / "caches").iterdir())
    facts = read_facts(cache)
    assert facts
    assert (facts.model, facts.precision, facts.attention) == ("tiny", "fp32", first.attention)
    shards = sorted(cache.glob("shard-*"))
    assert len(shards) == 2
    content = bytearray((shards[1] / "values.npy").read_bytes())
    content[-1] ^= 1
    (shards[1] / "values.npy").write_bytes(content)
    again = cached(pairs, tiny, tmp_path)
    assert again.computed == 12, "those of the damaged shard"
    assert (
        f"{shards[1] / 'values'}.npy is not what was written; its entries are computed again" in caplog.text
    )
    assert not shards[1].exists()
    keys = [sequence_key(s) for p in pairs for s in (p.chosen, p.rejected)]
    np.testing.assert_allclose(again.shard.sums(keys), first.shard.sums(keys), rtol=0, atol=1e-5)


def test_the_attention_is_known_without_the_weights(tiny: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(tiny, tmp_path / "bare")
    assert attention_of(bare) == load_model(bare).config._attn_implementation
    (bare / "model.safetensors").unlink()
    assert attention_of(bare) == attention_of(tiny)


def test_shares_leave_nothing_out_and_do_nothing_twice(tmp_path: Path) -> None:
    apart = random_sequences(150, 386, seed=4)
    sequences = apart + [Sequence(s.prompt, (*s.completion, 1)) for s in apart]
    write_sequences(tmp_path / "all.npz", sequences)
    assert read_sequences(tmp_path / "all.npz") == sequences
    for world in (1, 2, 3, 8):
        shares = [share(sequences, rank, world) for rank in range(world)]
        assert sorted(s.completion for part in shares for s in part) == sorted(
            s.completion for s in sequences
        )
        assert min(map(len, shares)) > 0
        owners = {s.prompt: rank for rank, part in enumerate(shares) for s in part}
        assert all(owners[s.prompt] == rank for rank, part in enumerate(shares) for s in part)
        # A rank that starts later, and finds part of the work done, still stands for the same sequences.
        for part, late in zip(shares, [share(sequences[150:], r, world) for r in range(world)], strict=True):
            assert late == [s for s in sequences[150:] if s in part]


@pytest.fixture
def job(tiny: Path, tmp_path: Path) -> ReferenceJob:
    """Enough small batches for a kill in their midst."""
    sequences = random_sequences(900, 386, seed=5)
    write_sequences(tmp_path / "missing.npz", sequences)
    facts = reference_facts(weights_digest(tiny), "fp32", attention_of(tiny))
    return ReferenceJob(
        model=str(tiny),
        attention=facts.attention,
        sequences=str(tmp_path / "missing.npz"),
        cache=str(tmp_path / "caches" / facts.key),
        work=str(tmp_path),
        precision="fp32",
        token_budget=32,
        threads=1,
        keep_seconds=0.1,
    )


def start_rank(job: ReferenceJob, rank: int, world: int) -> "subprocess.Popen[bytes]":
    path = Path(job.work) / "job.json"
    path.write_text(job.model_dump_json())
    place = {"RANK": str(rank), "WORLD_SIZE": str(world), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-X", "importtime", "-m", "dpo_core.reference.job", "--config", str(path)]
    with (Path(job.work) / f"log-{rank}").open("wb") as log:
        return subprocess.Popen(command, env=os.environ | place, cwd=REPOSITORY, stderr=log)


def test_of_two_ranks_one_is_killed_and_nothing_that_was_kept_is_computed_again(
    job: ReferenceJob, tiny: Path
) -> None:
    sequences = read_sequences(Path(job.sequences))
    ranks = [start_rank(job, rank, 2) for rank in range(2)]
    theirs = [[sequence_key(s) for s in share(sequences, rank, 2)] for rank in range(2)]
    deadline = time.monotonic() + 600
    # Its own shard is there: rank 1 has kept something.
    while not any(
        LogpShard.open(path).positions(theirs[1]).max() >= 0 for path in shard_folders(Path(job.cache))
    ):
        assert ranks[1].poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    ranks[1].send_signal(signal.SIGKILL)
    assert [rank.wait(timeout=600) for rank in ranks] == [0, -signal.SIGKILL]
    imported = (Path(job.work) / "log-0").read_text()
    assert re.search(r"\| +transformers$", imported, re.MULTILINE)
    assert not re.search(r"\| +deepspeed$", imported, re.MULTILINE), "a plain inference job"

    cache = ReferenceCache(Path(job.cache))
    assert cache.has(theirs[0]).all(), "the other rank went on to its end"
    kept = cache.has(theirs[1])
    assert 0 < kept.sum() < len(kept)
    known = [key for key, there in zip(theirs[1], kept, strict=True) if there] + theirs[0]
    before = cache.select(known)

    # On another number of ranks: what is left is all that is done.
    counted: list[int] = []
    run_ranks(job, 1, counted.append)
    assert counted[-1] == (~kept).sum()
    whole = ReferenceCache(Path(job.cache))
    np.testing.assert_array_equal(whole.select(known).values, before.values)
    values = whole.select([sequence_key(s) for s in sequences])
    model = load_model(tiny)
    for some in (sequences[:40], sequences[-40:]):
        with torch.no_grad():
            alone = [full_logps(model, s).sum() for s in some]
        np.testing.assert_allclose(values.sums([sequence_key(s) for s in some]), alone, rtol=0, atol=1e-4)


@pytest.mark.faults
def test_the_error_of_a_rank_reaches_who_started_it(
    job: ReferenceJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(StageFailed, match="the reference runs with sdpa attention, not flash"):
        run_ranks(job.model_copy(update={"attention": "flash"}), 2, lambda done: None)


@pytest.mark.faults
def test_all_ranks_fill_the_cache_and_tell_how_far_they_are(
    job: ReferenceJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    told: list[int] = []
    run_ranks(job, 2, told.append)
    keys = [sequence_key(s) for s in read_sequences(Path(job.sequences))]
    assert ReferenceCache(Path(job.cache)).has(keys).all()
    assert told == sorted(told)
    assert told[-1] == len(keys)


@pytest.mark.faults
def test_ranks_end_when_the_process_that_started_them_is_gone(job: ReferenceJob) -> None:
    rank = start_rank(job.model_copy(update={"parent": 2**22 + 1}), 0, 1)
    assert rank.wait(timeout=600) == 4
    left = json.loads((Path(job.work) / "error-0.json").read_text())
    assert left["problem"] == "the process that started this rank is gone"
