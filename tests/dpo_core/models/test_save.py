"""Saved checkpoints keep the data types, config and files of the checkpoint that the run started from."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpo_core import job as train
from dpo_core.models.config import ModelConfig
from dpo_core.models.load import convert, load_model
from dpo_core.models.save import save_checkpoint
from tests.support.models.families import make_family
from tests.support.models.tiny import make_tiny_model, make_tokenizer
from tests.support.runs.training_jobs import sft_job

# As some models ship it: transformers reads it with a warning, and refuses to write it.
GENERATION = {"eos_token_id": [0, 7], "temperature": 0.6, "do_sample": False}


def narrow(folder: Path, *wide: str) -> Path:
    """Store a checkpoint in bf16, but for the tensors with these names."""
    file = folder / "model.safetensors"
    tensors = {n: t if n in wide else t.bfloat16() for n, t in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    return folder


def dtypes(folder: Path) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for name, tensor in load_file(folder / "model.safetensors").items()}


def config_of(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())


def test_a_run_keeps_types_config_and_generation_config(alone: None, tmp_path: Path) -> None:
    norm = "model.norm.weight"
    source = narrow(make_tiny_model(tmp_path / "source", attention_dropout=0.25, use_cache=False), norm)
    imported, job = tmp_path / "imported", tmp_path / "job"
    convert(ModelConfig(name=str(source)), imported)
    assert train.main(["--config", str(sft_job(job, imported))]) == 0
    for written in (imported, job / "out"):
        assert dtypes(written) == dtypes(source)
        assert set(dtypes(written).values()) == {torch.bfloat16, torch.float32}
        assert config_of(written) == config_of(source)
        assert json.loads((written / "generation_config.json").read_text()) == GENERATION
        assert (written / "chat_template.jinja").is_file()
        tied = load_model(written)
        assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight
    before, read = load_model(source), load_model(imported)
    for name, tensor in before.state_dict().items():
        assert tensor.dtype == torch.float32, "trained in fp32"
        assert tensor.equal(read.state_dict()[name])
    after = load_model(job / "out").state_dict()
    assert not after["model.norm.weight"].equal(before.state_dict()["model.norm.weight"])


@pytest.mark.parametrize("family", ["mixtral", "gpt2"])
def test_experts_and_untied_heads_too(family: str, tmp_path: Path) -> None:
    source = narrow(make_family(tmp_path / "source", family))
    convert(ModelConfig(name=str(source)), tmp_path / "out")
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)


def test_fp32_stays_as_transformers_writes_it(tiny: Path, tmp_path: Path) -> None:
    save_checkpoint(load_model(tiny), make_tokenizer(), tmp_path / "plain")
    save_checkpoint(load_model(tiny), make_tokenizer(), tmp_path / "like", like=tiny)
    files = {file.name for file in (tmp_path / "plain").iterdir()}
    assert files == {file.name for file in (tmp_path / "like").iterdir()}
    for name in files:
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "like" / name).read_bytes(), name


def test_what_fp16_cannot_hold_stays_wide(tmp_path: Path) -> None:
    source = make_tiny_model(tmp_path / "source", tie_word_embeddings=False)
    file = source / "model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    model = load_model(source)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 1e5
    save_checkpoint(model, make_tokenizer(), tmp_path / "out", like=source)
    written = dtypes(tmp_path / "out")
    assert written.pop("lm_head.weight") == torch.float32
    assert set(written.values()) == {torch.float16}
    assert load_model(tmp_path / "out").lm_head.weight[0, 0] == 1e5
