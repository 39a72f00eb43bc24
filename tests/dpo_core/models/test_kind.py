"""Models that are not causal language models of text are refused by kind when imported."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING

from dpo_core.errors import ModelError
from dpo_core.models.config import ModelConfig
from dpo_core.models.load import convert, load_model, read_config
from dpo_core.models.source import check_context, position_limit
from tests.support.models.families import WIDTHS, family_config, make_family
from tests.support.models.tiny import make_tokenizer

TEXT = {**WIDTHS, "vocab_size": 386, "head_dim": 8}
SIGHT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
COMPOSITE = {
    "gemma3": {"text_config": TEXT, "vision_config": SIGHT},
    "qwen2_5_vl": {"text_config": TEXT},
    "llava": {"text_config": {**TEXT, "model_type": "llama"}},
    "qwen2_audio": {"text_config": {**TEXT, "model_type": "qwen2"}},
}


def folder_of(config: Any, folder: Path) -> ModelConfig:
    """A checkpoint folder that never comes to the reading of its weights."""
    config.save_pretrained(folder)
    save_file({"x": torch.zeros(1)}, folder / "model.safetensors")
    make_tokenizer().save_pretrained(folder)
    return ModelConfig(name=str(folder))


@pytest.mark.parametrize("kind", ["t5", "bart", "whisper", "marian"])
def test_encoder_decoders(kind: str, tmp_path: Path) -> None:
    config = folder_of(CONFIG_MAPPING[kind](), tmp_path)
    for read in (read_config, lambda config: convert(config, tmp_path / "out")):
        with pytest.raises(ModelError, match=rf"is an encoder-decoder \({kind}\)") as caught:
            read(config)
        assert "decoder-only" in caught.value.remedy


@pytest.mark.parametrize("kind", COMPOSITE)
def test_models_of_images_and_sound(kind: str, tmp_path: Path) -> None:
    config = folder_of(CONFIG_MAPPING[kind](**COMPOSITE[kind]), tmp_path)
    words = "an audio-language" if "audio" in kind else "a vision-language"
    for read in (read_config, lambda config: convert(config, tmp_path / "out")):
        with pytest.raises(ModelError, match=rf"is {words} model \({kind}\), which cannot be trained") as e:
            read(config)
        assert "as a separate checkpoint" in e.value.remedy


def test_the_language_model_of_a_vision_model_where_transformers_knows_it(tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    layers = {"layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 2}
    linear = {"linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
    sight = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32}
    ends = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    text = {**TEXT, "vocab_size": 400, **layers, **linear, **ends, "tie_word_embeddings": True}
    config = CONFIG_MAPPING["qwen3_5"](text_config=text, vision_config=sight, tie_word_embeddings=True)
    torch.manual_seed(0)
    full = AutoModelForImageTextToText.from_config(config).eval()
    full.save_pretrained(tmp_path / "whole")
    make_tokenizer().save_pretrained(tmp_path / "whole")
    convert(ModelConfig(name=str(tmp_path / "whole")), tmp_path / "out")
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path / "out")(ids).logits, full(input_ids=ids).logits)


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra"])
def test_bidirectional_models(kind: str, tmp_path: Path) -> None:
    config = ModelConfig(name=str(make_family(tmp_path / "model", kind, is_decoder=False)))
    with pytest.raises(ModelError, match=r"reads the tokens after a position too \(bidirectional"):
        convert(config, tmp_path / "out")


def test_the_same_classes_as_decoders_are_taken(tmp_path: Path) -> None:
    make_family(tmp_path / "model", "bert", is_decoder=True, tie_word_embeddings=True)
    convert(ModelConfig(name=str(tmp_path / "model")), tmp_path / "out")


def test_positions_by_other_names() -> None:
    from types import SimpleNamespace

    for kind, limit in {"llama": 512, "gpt2": 512, "xglm": 2048}.items():
        assert position_limit(family_config(kind)) == limit, kind
    for kind in ("bloom", "mamba"):
        assert position_limit(CONFIG_MAPPING[kind]()) is None, "ALiBi and states have no end"
    assert position_limit(SimpleNamespace(n_positions=1024, n_ctx=512)) == 1024
    assert position_limit(SimpleNamespace(text_config={"max_position_embeddings": 32})) == 32
    with pytest.raises(ModelError, match="rows of 300 tokens, and the model has only 256"):
        check_context(SimpleNamespace(n_ctx=256), 300)


def test_an_evaluated_model_must_hold_the_rows_too(tmp_path: Path) -> None:
    from dpo_core.evaluation.model_under_test import ModelUnderTest
    from dpo_core.evaluation.prompt import Prompt
    from dpo_core.generation.config import SamplingConfig

    subject = ModelUnderTest(make_family(tmp_path / "model", "gpt2", n_positions=16), "small")
    with pytest.raises(ModelError, match="the model has only 16"):
        subject.answers([Prompt("a b c d e f", chat=False)], SamplingConfig(max_new_tokens=12), seed=0)
    assert len(subject.answers([Prompt("a", chat=False)], SamplingConfig(max_new_tokens=4), seed=0)) == 1
