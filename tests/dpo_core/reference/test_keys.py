"""The keys of the reference cache change with everything that affects a log-prob."""

from pathlib import Path

from dpo_core.data.tokens.sequences import TokenSequence
from dpo_core.models.source import weights_digest
from dpo_core.reference import ReferenceFacts, sequence_key
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


def test_the_key_of_a_cache_sees_weights_precision_attention_and_definition() -> None:
    base = ReferenceFacts(weights_sha256="a", precision="fp32", attention="sdpa")
    changes = [
        {"weights_sha256": "b"}, {"precision": "bf16"}, {"attention": "eager"}, {"definition_version": 99}
    ]  # fmt: skip
    assert len({base.key, *(base.model_copy(update=change).key for change in changes)}) == 5
    assert base.model_copy(update={"model": "words for people"}).key == base.key


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
