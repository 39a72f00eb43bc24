"""Models from scratch: the configured shape, another model's tokenizer, the same bytes for a seed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoConfig, GPT2Config, LlamaConfig, MixtralConfig, Qwen3Config, T5Config

from dpo_core.errors import ModelError
from dpo_core.models.config import ModelConfig, ScratchConfig
from dpo_core.models.from_scratch import make_from_scratch, scratch_shape
from dpo_core.models.load import convert, load_model, load_tokenizer, read_config
from dpo_core.models.source import parameter_count, weights_digest

SHAPE = {"layers": 3, "hidden_size": 24, "heads": 2}


def made(tiny: Path, out: Path, **changes: Any) -> Path:
    convert(ModelConfig(name=str(tiny), scratch=SHAPE | changes), out)
    return out


def test_a_model_has_the_shape_and_the_others_tokenizer(tiny: Path, tmp_path: Path) -> None:
    out = made(tiny, tmp_path / "out")
    config, named = AutoConfig.from_pretrained(out), AutoConfig.from_pretrained(tiny)
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (3, 24, 128)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (2, 2, 12)
    for name in ("vocab_size", "max_position_embeddings", "tie_word_embeddings", "model_type"):
        assert getattr(config, name) == getattr(named, name)
    model, tokenizer = load_model(out), load_tokenizer(out)
    assert tokenizer.get_vocab() == load_tokenizer(tiny).get_vocab()
    assert model.config.eos_token_id == tokenizer.eos_token_id
    layer = 4 * 24 * 24 + 3 * 24 * 128 + 2 * 24
    assert parameter_count(out) == 3 * layer + 24 + config.vocab_size * 24
    with torch.no_grad():
        logits = model(torch.tensor([[5, 6, 7, 8]])).logits
    chance = torch.log(torch.tensor(float(config.vocab_size)))
    assert torch.logsumexp(logits, -1).mean() == pytest.approx(float(chance), abs=0.1), "it knows nothing yet"


def test_a_seed_draws_the_same_bytes_and_another_other_ones(tiny: Path, tmp_path: Path) -> None:
    torch.manual_seed(17)
    state = torch.get_rng_state()
    first = made(tiny, tmp_path / "a")
    assert torch.get_rng_state().equal(state), "the global random numbers are left alone"
    torch.manual_seed(18)
    digests = [weights_digest(f) for f in (first, made(tiny, tmp_path / "b"))]
    assert digests[0] == digests[1]
    assert weights_digest(made(tiny, tmp_path / "c", seed=1)) != digests[0]


def test_the_config_is_known_without_the_weights(tiny: Path, tmp_path: Path) -> None:
    config = read_config(ModelConfig(name=str(tiny), scratch=SHAPE))
    written = AutoConfig.from_pretrained(made(tiny, tmp_path / "out"))
    ignored = {"architectures", "dtype", "_name_or_path", "transformers_version"}
    both = [{k: v for k, v in c.to_dict().items() if k not in ignored} for c in (config, written)]
    assert both[0] == both[1]
    assert read_config(ModelConfig(name=str(tiny))).hidden_size == 32


def test_the_feed_forward_width_may_be_given() -> None:
    assert ScratchConfig(hidden_size=100, heads=2).feed_forward == 448
    assert ScratchConfig(hidden_size=128).feed_forward == 512
    assert ScratchConfig(hidden_size=128, intermediate_size=352).feed_forward == 352


@pytest.mark.parametrize(
    "source",
    [
        GPT2Config(vocab_size=60, n_positions=32),
        Qwen3Config(vocab_size=60, layer_types=["full_attention"] * 12, num_hidden_layers=12),
        LlamaConfig(vocab_size=60, num_key_value_heads=4, head_dim=80),
    ],
    ids=lambda config: config.model_type,
)
def test_other_architectures(source: Any) -> None:
    model = make_from_scratch(source, ScratchConfig(**SHAPE), None, trust_remote_code=False)
    assert model.get_input_embeddings().weight.shape == (60, 24)
    assert not model.training
    assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 60)
    assert model.config.num_hidden_layers == 3
    assert source.num_hidden_layers != 3, "the named model's own config is left alone"


@pytest.mark.parametrize(
    "source", [MixtralConfig(vocab_size=60), T5Config(vocab_size=60)], ids=lambda c: c.model_type
)
def test_an_architecture_with_other_sizes_is_refused(source: Any) -> None:
    with pytest.raises(
        ModelError, match=f"architecture {source.model_type} cannot be made from scratch"
    ) as e:
        scratch_shape(source, ScratchConfig())
    assert "model.scratch" in e.value.remedy


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"hidden_size": 100, "heads": 3}, "hidden_size 100 is not a multiple of heads 3"),
        ({"hidden_size": 12, "heads": 4}, "hidden_size / heads is 3, and rotary"),
        ({"layers": 0}, "greater than or equal to 1"),
        ({"width": 3}, "Extra inputs"),
    ],
)
def test_a_shape_that_cannot_be(shape: dict[str, int], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ScratchConfig(**shape)


def test_a_vocabulary_of_its_own(tiny: Path, tmp_path: Path) -> None:
    """A tokenizer of the same kind, trained on the self-made reviews; the same bytes for a seed."""
    config = ModelConfig(name=str(tiny), scratch=ScratchConfig(**SHAPE, vocabulary=500))
    for name in ("one", "two"):
        convert(config, tmp_path / name)
    tokenizer, model = load_tokenizer(tmp_path / "one"), load_model(tmp_path / "one")
    assert len(tokenizer) == model.config.vocab_size == 500
    assert model.config.eos_token_id == tokenizer.eos_token_id
    text = "The soup was wonderful, and the staff were friendly."
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert len(ids) < len(load_tokenizer(tiny)(text)["input_ids"]), "it knows the words of reviews"
    for file in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert read_config(config).vocab_size == 500
