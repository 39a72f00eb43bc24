"""Reading and computing reference log-probs: what is computed again, and ranks of which one is killed."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dpo_core.data.tokens.config import TokenConfig
from dpo_core.data.tokens.sequences import TokenPair
from dpo_core.data.tokens.tokenise import Tokenise
from dpo_core.models.load import load_model, load_tokenizer
from dpo_core.models.source import weights_digest
from dpo_core.reference import sequence_key
from dpo_core.reference.cache import read_facts
from dpo_core.reference.logps import (
    CacheSettings,
    Reference,
    ReferenceLogps,
    attention_of,
    reference_logps,
)

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
    return reference_logps(
        [s for p in pairs for s in (p.chosen, p.rejected)],
        Reference(model, weights_digest(model), precision, "tiny"),
        CacheSettings(folder / "caches", token_budget=256),
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
    # Another order, part of the data: the same entries.
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


@pytest.mark.usefixtures("real_bf16")
@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_part_of_the_key_is_computed_again(
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


def test_damaged_shards_are_reported_and_computed_again(
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
        f"{shards[1] / 'values'}.npy has changed since it was written; its entries are computed again"
        in caplog.text
    )
    assert not shards[1].exists()
    keys = [sequence_key(s) for p in pairs for s in (p.chosen, p.rejected)]
    np.testing.assert_allclose(again.shard.sums(keys), first.shard.sums(keys), rtol=0, atol=1e-5)


def test_the_attention_is_known_without_the_weights(tiny: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(tiny, tmp_path / "bare")
    assert attention_of(bare) == load_model(bare).config._attn_implementation
    (bare / "model.safetensors").unlink()
    assert attention_of(bare) == attention_of(tiny)
