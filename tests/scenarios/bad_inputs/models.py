"""Bad models. What a job finds in weights and tokenizers: tests/dpo_core/models/test_load.py."""

import json
import pickle
from pathlib import Path
from typing import Any

from tests.scenarios.bad_inputs import World, bad


def _edit(path: Path, **changes: Any) -> None:
    facts = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in (facts | changes).items() if v is not None}))


@bad(2, "no model at", "absent", "Name a checkpoint folder, a .gguf file or a hub model")
def model_missing(world: World) -> list[str]:
    return world.run(model={"name": str(world.new_folder() / "absent")})


@bad(2, "has no accessible model of that name", "nobody/nothing", "download the model and name its folder")
def model_on_the_hub_offline(world: World) -> list[str]:
    return world.run(model={"name": "nobody/nothing"})


@bad(2, "the package no_such_package.inner, which contains the model, is not installed", "Install it")
def model_in_a_missing_inner_package(world: World) -> list[str]:
    return world.run(model={"name": "package:no_such_package.inner"})


@bad(2, "the package json contains 0 .gguf files", "Name the file itself")
def model_in_a_package_without_one(world: World) -> list[str]:
    return world.run(model={"name": "package:json"})


@bad(2, "model.scratch", "hidden_size 100 is not a multiple of heads 3")
def model_from_scratch_with_heads_that_do_not_divide(world: World) -> list[str]:
    return world.run(model={"scratch": {"hidden_size": 100, "heads": 3}})


@bad(2, "holds no config.json", "Name the folder of a Hugging Face checkpoint")
def model_without_a_config(world: World) -> list[str]:
    return world.run_model(lambda model: (model / "config.json").unlink())


@bad(2, "config.json cannot be read", "complete checkpoint")
def model_with_a_broken_config(world: World) -> list[str]:
    return world.run_model(lambda model: (model / "config.json").write_text('{"model_type": '))


@bad(2, "holds no safetensors weights", "complete checkpoint")
def model_without_weights(world: World) -> list[str]:
    return world.run_model(lambda model: (model / "model.safetensors").unlink())


@bad(2, "holds only pickled weights (pytorch_model.bin)", "Convert them to safetensors first")
def model_with_pickled_weights(world: World) -> list[str]:
    def change(model: Path) -> None:
        (model / "model.safetensors").unlink()
        (model / "pytorch_model.bin").write_bytes(pickle.dumps({"x": 1}))

    return world.run_model(change)


@bad(2, "lacks 1 weights that its config asks for", "model.layers.1.mlp.up_proj.weight")
def model_without_one_tensor(world: World) -> list[str]:
    from safetensors.torch import load_file, save_file

    def change(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})

    return world.run_model(change)


@bad(2, "rows of 160 tokens, and the model has only 64", "Set tokens.max_length to 64 or less")
def model_with_a_small_context(world: World) -> list[str]:
    return world.run_model(lambda model: _edit(model / "config.json", max_position_embeddings=64))


@bad(2, "rows of 5000 tokens, and the model has only 512", "Set tokens.max_length to 512 or less")
def budget_beyond_the_context(world: World) -> list[str]:
    return world.run("--set", "tokens.max_length=5000")


@bad(2, "the tokenizer in", "cannot be loaded", "tokenizer.json, tokenizer_config.json")
def tokenizer_missing(world: World) -> list[str]:
    def change(model: Path) -> None:
        for path in model.glob("tokenizer*"):
            path.unlink()

    return world.run_model(change)


@bad(2, "own.gguf does not start with the GGUF signature", "download it again")
def gguf_that_is_none(world: World) -> list[str]:
    return world.run(model={"name": world.file("own.gguf", b"<html>404</html>" * 10)})


@bad(2, "own.gguf cannot be loaded", "download it again")
def gguf_cut_off(world: World) -> list[str]:
    header = b"GGUF" + (3).to_bytes(4, "little") + (99).to_bytes(8, "little") * 2
    return world.run(model={"name": world.file("own.gguf", header)})


@bad(2, "the chat template", "absent.jinja cannot be read (No such file", "model.chat_template")
def chat_template_missing(world: World) -> list[str]:
    return world.run(model={"chat_template": str(world.new_folder() / "absent.jinja")})
