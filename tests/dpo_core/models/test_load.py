"""Checkpoints: locating, converting, and refusing those that would silently train something else."""

import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpo_core.errors import ModelError
from dpo_core.models.config import ModelConfig
from dpo_core.models.dropout import disable_dropout
from dpo_core.models.load import check_finite, check_tokenizer_fits, convert, load_model, load_tokenizer
from dpo_core.models.source import check_context, locate, parameter_count, source_digest
from dpo_core.models.transformers_lock import quiet_transformers
from tests.support.models.tiny import CHAT_TEMPLATE, make_tiny_model


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    """The tiny checkpoint in a folder of the test's own."""
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_model(folder)(torch.tensor([[5, 6, 7, 8]])).logits


def test_a_folder_and_a_gguf_file_are_found(tiny: Path, tmp_path: Path) -> None:
    assert locate(ModelConfig(name=str(tiny))) == tiny
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert locate(ModelConfig(name=str(tmp_path / "m.gguf"))) == tmp_path / "m.gguf"


def test_a_package_that_carries_one_model_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "carries_a_model"
    (folder / "data").mkdir(parents=True)
    # Finding it must not run the package, whose dependencies may be absent.
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "data" / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path))
    config = ModelConfig(name="package:carries_a_model")
    assert locate(config) == folder / "data" / "m.gguf"
    (folder / "n.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"contains 2 \.gguf files"):
        locate(config)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("package:no_such_package_here", "is not installed"),
        ("./no-such-folder", "no model at"),
        ("/no/such/folder", "no model at"),
        ("nobody/no-such-model", "no accessible model"),
    ],
)
def test_what_is_not_there_is_said(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        locate(ModelConfig(name=name))
    assert caught.value.remedy


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        locate(ModelConfig(name=str(tmp_path)))


def test_converting_keeps_the_function_and_sets_the_template(tiny: Path, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[0]['content'] }}")
    out = tmp_path / "out"
    convert(ModelConfig(name=str(tiny), chat_template=str(template)), out)
    assert logits(out).equal(logits(tiny))
    assert load_tokenizer(out).chat_template == template.read_text()
    assert load_tokenizer(tiny).chat_template == CHAT_TEMPLATE
    assert next(load_model(out).parameters()).dtype == torch.float32
    with pytest.raises(ModelError, match="cannot be read"):
        convert(ModelConfig(name=str(tiny), chat_template="no-such.jinja"), out)


def test_a_bf16_checkpoint_becomes_fp32(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    save_file({k: v.bfloat16() for k, v in weights.items()}, copy / "model.safetensors", {"format": "pt"})
    model = load_model(copy)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not model.training


def test_a_missing_weight_is_refused_and_not_drawn_at_random(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights.*layers\.1\.mlp\.up_proj"):
        load_model(copy)


def test_weights_of_another_shape_are_refused(copy: Path) -> None:
    change_config(copy, intermediate_size=80)
    with pytest.raises(ModelError):
        load_model(copy)


def test_damaged_weights_are_refused(copy: Path) -> None:
    content = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(copy)


def test_pickled_weights_are_never_read(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(ModelError, match="only pickled weights"):
        load_model(copy)
    (copy / "pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match="no safetensors"):
        load_model(copy)


def test_an_architecture_nobody_knows_is_refused(copy: Path) -> None:
    change_config(copy, model_type="no-such-architecture")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(copy)


def test_weights_that_are_not_finite_are_refused(copy: Path, tmp_path: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"][3] = float("inf")
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.norm\.weight.*NaN or infinity"):
        convert(ModelConfig(name=str(copy)), tmp_path / "out")
    check_finite(load_model(make_tiny_model(tmp_path / "whole")), "whole")


def test_a_tokenizer_must_exist_and_end_answers(copy: Path, tokenizer: Any) -> None:
    tokenizer_config = json.loads((copy / "tokenizer_config.json").read_text())
    tokenizer_config.pop("eos_token")
    (copy / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    with pytest.raises(ModelError, match="has no end-of-sequence token"):
        load_tokenizer(copy)
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_tokenizer(copy)


def test_a_tokenizer_of_another_model_is_refused(tiny: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny)
    check_tokenizer_fits(load_model(tiny), tokenizer)
    small = load_model(make_tiny_model(tmp_path / "small", vocab_size=100))
    with pytest.raises(ModelError, match="has 386 tokens and the model embeds only 100"):
        check_tokenizer_fits(small, tokenizer)
    turns = load_model(make_tiny_model(tmp_path / "turns", eos_token_id=7))
    turns.generation_config.eos_token_id = [7, tokenizer.eos_token_id]
    check_tokenizer_fits(turns, tokenizer)
    ends_elsewhere = load_model(make_tiny_model(tmp_path / "eos", eos_token_id=[7, 9]))
    with pytest.raises(ModelError, match=r"with id 0, the model with \[7, 9\]"):
        check_tokenizer_fits(ends_elsewhere, tokenizer)
    check_tokenizer_fits(load_model(make_tiny_model(tmp_path / "many", eos_token_id=[7, 0])), tokenizer)


def test_weights_without_a_place_are_refused_and_old_masks_are_not(tiny: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny, tmp_path / "copy")
    file = copy / "model.safetensors"
    mask = {"model.layers.0.self_attn.attn.masked_bias": torch.tensor(-1e9)}
    save_file(load_file(file) | mask, file, {"format": "pt"})
    load_model(copy)
    save_file(load_file(file) | {"score.weight": torch.ones(1, 32)}, file, {"format": "pt"})
    with pytest.raises(ModelError, match="1 weights that LlamaForCausalLM has no place for, first score"):
        load_model(copy)


def test_rows_must_fit_the_positions(model: Any) -> None:
    check_context(model.config, 512)
    with pytest.raises(ModelError, match="rows of 513 tokens, and the model has only 512"):
        check_context(model.config, 513)


def test_rows_stay_within_the_short_rotary_factors() -> None:
    """Beyond them transformers takes the long factors for a whole batch, by its longest row."""
    from types import SimpleNamespace

    from transformers import Phi3Config

    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 512}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, **factors, "original_max_position_embeddings": 64}
    as_stored = {"rope_scaling": {"type": "longrope", **factors}, "original_max_position_embeddings": 64}
    loaded = Phi3Config(**sizes, rope_parameters=rope, original_max_position_embeddings=64)
    for config in (loaded, SimpleNamespace(max_position_embeddings=512, **as_stored)):
        check_context(config, 64)
        with pytest.raises(ModelError, match="rows of 65 tokens, and beyond 64 this model uses other rotary"):
            check_context(config, 65)


def test_without_dropout_training_mode_computes_the_eval_function(tmp_path: Path) -> None:
    model = load_model(make_tiny_model(tmp_path / "m", attention_dropout=0.5)).train()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert not model(ids).logits.equal(model(ids).logits), "dropout is active before"
        disable_dropout(model)
        assert model(ids).logits.equal(model.eval()(ids).logits)


def test_without_dropout_other_architectures_too() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=16)).train()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert not model(ids).logits.equal(model(ids).logits), "dropout is active before"
        disable_dropout(model)
        assert model(ids).logits.equal(model.eval()(ids).logits)


def test_parameters_are_counted_from_the_headers(tiny: Path) -> None:
    # Tied embeddings are stored once and counted once.
    assert parameter_count(tiny) == sum(p.numel() for p in load_model(tiny).parameters())


def test_the_source_digest_sees_every_file_of_the_model(copy: Path) -> None:
    digests = {source_digest(copy)}
    (copy / "README.md").write_text("nothing")
    digests.add(source_digest(copy))
    assert len(digests) == 1
    change_config(copy, rope_theta=7.0)
    digests.add(source_digest(copy))
    (copy / "tokenizer_config.json").write_text("{}")
    digests.add(source_digest(copy))
    (copy / "chat_template.jinja").write_text("other")
    digests.add(source_digest(copy))
    (copy / "model.safetensors").write_bytes(b"")
    digests.add(source_digest(copy))
    assert len(digests) == 5
    (copy.parent / "m.gguf").write_bytes(b"GGUF")
    assert source_digest(copy.parent / "m.gguf") == source_digest(copy.parent / "m.gguf")


@pytest.mark.parametrize("offline", [True, False])
def test_a_saved_tokenizer_does_not_tell_whether_the_hub_could_be_asked(
    copy: Path, tmp_path: Path, offline: bool
) -> None:
    path = copy / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"local_files_only": offline}))
    load_tokenizer(copy).save_pretrained(tmp_path / "saved")
    assert "local_files_only" not in (tmp_path / "saved" / "tokenizer_config.json").read_text()


THREADS = """
import sys, threading
from pathlib import Path
from dpo_core.models.load import load_model, load_tokenizer
start, folder = threading.Barrier(3), Path(sys.argv[1])
wrong = []
def load(what):
    start.wait()
    try:
        what(folder)
    except BaseException as error:
        wrong.append(error)
loads = [load_tokenizer, load_model, load_tokenizer]
threads = [threading.Thread(target=load, args=[what]) for what in loads]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
sys.exit(repr(wrong) if wrong else 0)
"""


@pytest.mark.slow  # a process of its own; the lock that sees to it is tested below
def test_the_first_loads_of_a_process_may_be_those_of_several_threads(tiny: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", THREADS, str(tiny)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_transformers_is_used_by_one_thread_at_a_time() -> None:
    entered = threading.Event()

    def enter() -> None:
        with quiet_transformers():
            entered.set()

    other = threading.Thread(target=enter)
    with quiet_transformers(), quiet_transformers():
        other.start()
        assert not entered.wait(0.2)
    assert entered.wait(5)
    other.join()
