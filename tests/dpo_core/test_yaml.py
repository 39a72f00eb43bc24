"""Untrusted YAML: only plain values, each key once, and of limited size are accepted."""

import os
import time
from pathlib import Path

import pytest
import yaml

from dpo_core.data.config import DataConfig
from dpo_core.errors import DpoError, RecipeError
from dpo_core.models.source import read_template
from dpo_core.system import MAX_BYTES, read_small
from dpo_core.yaml import quoted, read_yaml
from flows.commands.cluster import read_cluster
from tasks.recipe.read import load_recipe

REPO = Path(__file__).resolve().parents[2]
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{after}: &{after} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, after in zip("abcdefgh", "bcdefghi", strict=True)
)
BAD = {
    "object": ("x: !!python/object/apply:os.system ['touch {}']", "could not determine a constructor"),
    "module": ("x: !!python/name:os.system", "could not determine a constructor"),
    "laughs": (LAUGHS, "aliases expand to more than 100,000 values"),
    "itself": ("a: &a [*a]", "a value that contains it"),
    "twice": ("seed: 1\nname: x\nseed: 2\n", "the key seed is on line 1 and again on line 3"),
    "twice inside": ("dpo: {epochs: 1, epochs: 2}", "the key epochs is on line 1 and again on line 1"),
    "deep": ("[" * 150, "nested too deeply"),
    "no such day": ("name: x\ndescription: 2026-02-30", "2026-02-30 cannot be read as timestamp"),
    "no number": ("seed: !!int abc", "abc cannot be read as int"),
    "no truth": ("seed: !!bool maybe", "maybe cannot be read as bool"),
    "no moment": ("seed: !!timestamp soon", "soon cannot be read as timestamp"),
    "digits": (f"seed: {'7' * 5000}", "7777 cannot be read as int"),
}


def test_ordinary_files_read_as_the_safe_loader_reads_them() -> None:
    for path in [*(REPO / "flows" / "recipes").glob("*.yaml"), REPO / "deploy" / "prefect.yaml"]:
        assert read_yaml(path.read_text()) == yaml.safe_load(path.read_text())
    assert read_yaml("") is None
    assert read_yaml("a: &x {b: 1}\nc: {<<: *x, b: 2}") == {"a": {"b": 1}, "c": {"b": 2}}
    assert read_yaml("1: a\n'1': b") == {1: "a", "1": "b"}


@pytest.mark.parametrize("name", BAD)
def test_unsafe_yaml_is_refused_wherever_it_is_read(name: str, tmp_path: Path) -> None:
    from flows.commands.deploy import read_deployment_file

    text, words = BAD[name]
    trace = tmp_path / "executed"
    path = tmp_path / "given.yaml"
    path.write_text(text.replace("{}", str(trace)))
    began = time.process_time()
    readers = [
        lambda: load_recipe(str(path)),
        lambda: read_cluster("slurm", str(path), []),
        lambda: read_deployment_file(path),
    ]
    for read in readers:
        with pytest.raises(RecipeError, match=words):
            read()
    if "\n" not in path.read_text():
        with pytest.raises(RecipeError, match="not valid YAML"):
            load_recipe("demo", [f"description={path.read_text()}"])
    assert not trace.exists()
    assert time.process_time() - began < 30


@pytest.mark.parametrize(
    "text",
    ["/d/p😀.jsonl", "/d/𠮷.jsonl", 'a "b" \\ c', "a\u2028b\u0085c", "\x7f\ttab\nline", "ü: #x", "\udc80"],
)
def test_a_quoted_text_is_read_back_as_it_was(text: str) -> None:
    from tasks.recipe.read import with_overrides

    assert read_yaml(quoted(text)) == text
    if text.isprintable():
        raw: dict[str, object] = {}
        settings = with_overrides(DataConfig, raw, [f"path={quoted(text)}"], "unusable", "")
        assert settings.path == text


def test_a_file_that_does_not_end_is_not_read(tmp_path: Path) -> None:
    large, pipe = tmp_path / "large.yaml", tmp_path / "pipe.yaml"
    large.write_text("#" * (MAX_BYTES + 1))
    os.mkfifo(pipe)
    for path, words in [("/dev/zero", "not a regular file"), (pipe, "not a regular file"), (large, "1 MiB")]:
        with pytest.raises(OSError, match=words):
            read_small(Path(path))
        for read in (load_recipe, _deploy_file, _cluster_settings, read_template):
            with pytest.raises(DpoError, match=f"cannot be read .*{words}"):
                read(str(path))


def _deploy_file(path: str) -> object:
    from flows.commands.deploy import read_deployment_file

    return read_deployment_file(Path(path))


def _cluster_settings(path: str) -> object:
    return read_cluster("slurm", path, [])
