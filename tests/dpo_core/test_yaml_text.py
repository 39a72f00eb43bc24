"""YAML of strangers: plain values alone, each key once, of a size that a person would write."""

import time
from pathlib import Path

import pytest
import yaml

from dpo_core.errors import RecipeError
from dpo_core.yaml_text import read_yaml
from flows.launch_command import cluster_config
from tasks.recipe import load_recipe

REPO = Path(__file__).resolve().parents[2]
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{after}: &{after} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, after in zip("abcdefgh", "bcdefghi", strict=True)
)
BAD = {
    "object": ("x: !!python/object/apply:os.system ['touch {}']", "could not determine a constructor"),
    "module": ("x: !!python/name:os.system", "could not determine a constructor"),
    "laughs": (LAUGHS, "aliases stand for more than 100,000 values"),
    "itself": ("a: &a [*a]", "inside of what it names"),
    "twice": ("seed: 1\nname: x\nseed: 2\n", "the key seed stands on line 1 and again on line 3"),
    "twice inside": ("dpo: {epochs: 1, epochs: 2}", "the key epochs stands on line 1 and again on line 1"),
    "deep": ("[" * 150, "nested too deeply"),
}


def test_ordinary_files_read_as_the_safe_loader_reads_them() -> None:
    for path in [*(REPO / "flows" / "recipes").glob("*.yaml"), REPO / "deploy" / "prefect.yaml"]:
        assert read_yaml(path.read_text()) == yaml.safe_load(path.read_text())
    assert read_yaml("") is None
    assert read_yaml("a: &x {b: 1}\nc: {<<: *x, b: 2}") == {"a": {"b": 1}, "c": {"b": 2}}
    assert read_yaml("1: a\n'1': b") == {1: "a", "1": "b"}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_plain_writing_is_refused_wherever_yaml_is_read(name: str, tmp_path: Path) -> None:
    from deploy.prefect_file import read_prefect_file

    text, words = BAD[name]
    trace = tmp_path / "executed"
    path = tmp_path / "given.yaml"
    path.write_text(text.replace("{}", str(trace)))
    began = time.monotonic()
    readers = [
        lambda: load_recipe(str(path)),
        lambda: cluster_config("slurm", str(path), []),
        lambda: read_prefect_file(path, {}),
    ]
    for read in readers:
        with pytest.raises(RecipeError, match=words):
            read()
    if "\n" not in path.read_text():
        with pytest.raises(RecipeError, match="not valid YAML"):
            load_recipe("demo", [f"description={path.read_text()}"])
    assert not trace.exists()
    assert time.monotonic() - began < 30
