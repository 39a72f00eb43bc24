"""The keys of the reference cache change with everything that affects a log-prob."""

from pathlib import Path

import pytest

from dpo_core.data.tokens.sequences import TokenSequence
from dpo_core.models.source import weights_digest
from dpo_core.reference import keys, reference_key, sequence_key
from tests.support.models.tiny import make_tiny_model


def test_the_key_of_a_sequence_sees_tokens_and_where_the_prompt_ends() -> None:
    base = TokenSequence((1, 2), (3, 4))
    others = [
        TokenSequence((1, 2), (3, 5)),
        TokenSequence((9, 2), (3, 4)),
        TokenSequence((1,), (2, 3, 4)),
        TokenSequence((1, 2, 3), (4,)),
        TokenSequence((1, 2), (3,)),
        TokenSequence((1, 2), (3, 4, 0)),
        TokenSequence((1, 2), (4, 3)),
    ]
    assert len({sequence_key(s) for s in [base, *others]}) == 8
    # Equal ids are equal, whichever way they came to be.
    assert sequence_key(TokenSequence((1, 2), (3, 4), truncated=True)) == sequence_key(base)
    # Written down by earlier runs: another encoding of the same ids would find none of their values.
    assert sequence_key(base).hex() == "c97923ad0cb5e492c1f34e9c93d2badf"


def test_the_key_of_a_cache_sees_weights_precision_attention_and_definition(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = reference_key("a", "fp32", "sdpa")
    assert reference_key("a", "fp32", "sdpa") == base
    others = [
        reference_key("b", "fp32", "sdpa"),
        reference_key("a", "bf16", "sdpa"),
        reference_key("a", "fp32", "eager"),
    ]
    monkeypatch.setattr(keys, "DEFINITION_VERSION", keys.DEFINITION_VERSION + 1)
    others.append(reference_key("a", "fp32", "sdpa"))
    assert len({base, *others}) == 5


def test_the_weights_digest_sees_one_weight_and_nothing_beside_the_model(tiny: Path, tmp_path: Path) -> None:
    same = make_tiny_model(tmp_path / "same")
    (same / "notes.txt").write_text("anything")
    (same / "tokenizer_config.json").unlink()
    assert weights_digest(same) == weights_digest(tiny)
    weights = same / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert weights_digest(same) != weights_digest(tiny)
    assert weights_digest(make_tiny_model(tmp_path / "other", rope_theta=500.0)) != weights_digest(tiny)


def test_what_is_learnt_is_part_of_the_key() -> None:
    plain, masked = TokenSequence((1, 2), (3, 4)), TokenSequence((1, 2), (3, 4), learnt=(False, True))
    assert sequence_key(plain) != sequence_key(masked)
    assert sequence_key(masked) != sequence_key(TokenSequence((1, 2), (3, 4), learnt=(True, False)))
