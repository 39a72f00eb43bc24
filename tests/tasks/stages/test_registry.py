"""The registry finds every stage, and no other file of the product writes a stage's name."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import tasks
from dpo_core.methods.registry import methods
from tasks.stages.base import Stage
from tasks.stages.registry import is_stage, label_of, stage_of, stages
from tasks.store.facts import Facts

ROOT = Path(tasks.__file__).parent.parent
PRODUCT = ("tasks", "flows", "deploy", "expectations")


def literals(tree: ast.AST) -> Iterator[tuple[int, str, ast.AST]]:
    """Line, text and parent of every string literal; of an f-string its constant parts.

    Docstrings are left out, and the name that a stage is declared with.
    """
    for child in ast.iter_child_nodes(tree):
        if isinstance(tree, ast.Call) and called(tree) == "Stage" and child in tree.args[:1]:
            continue
        text = child.value if isinstance(child, ast.Constant) else None
        if isinstance(text, str) and not isinstance(tree, ast.Expr):
            yield child.lineno, text, tree
        yield from literals(child)


def called(call: ast.Call) -> str:
    """The last part of what is called."""
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def product() -> Iterator[tuple[str, str]]:
    """Path and source of every file that may name stages and methods by their registries alone."""
    for package in PRODUCT:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), path.read_text()


def is_key(parent: ast.AST) -> bool:
    """Whether a literal is what something is looked up or compared by."""
    if isinstance(parent, ast.Subscript | ast.Compare):
        return True
    lookups = {"get", "pop", "setdefault", "startswith", "removeprefix", "keep", "stage_task"}
    return isinstance(parent, ast.Call) and called(parent) in lookups


def written(source: str, names: set[str]) -> list[str]:
    """The literals that stand for stages: a name, a name with a label, or what names begin with.

    Names without a hyphen are words of the language too: they count where something is looked up by them.
    """
    prefixes = {name.partition("-")[0] + "-" for name in names if "-" in name}
    lines = []
    for line, text, parent in literals(ast.parse(source)):
        name = text.partition(" ")[0]
        labelled = name in names and ("-" in name or text != name or is_key(parent))
        sentence = text.count(" ") > 1 and not isinstance(parent, ast.JoinedStr)
        if (labelled and not sentence) or text in prefixes:
            lines.append(f"{line}: {text!r}")
    return lines


def test_what_counts_as_a_name() -> None:
    names = {"train-dpo", "judge"}
    assert written('x["judge"]; "judge" in x; keep("judge", y)', names) == ["1: 'judge'"] * 3
    assert written('f"train-{method}"; f"judge {policy}"; a = "train-dpo"', names) == [
        "1: 'train-'", "1: 'judge '", "1: 'train-dpo'",
    ]  # fmt: skip
    assert written('Stage("train-dpo", 1, "model")', names) == []
    assert written('"""train-dpo"""; a = "judge"; b = "the judge"; c = "judge by its work"', names) == []


def test_a_stage_is_named_where_it_is_declared_and_nowhere_else() -> None:
    names = set(stages())
    mentions = {path: lines for path, source in product() if (lines := written(source, names))}
    assert mentions == {}


def test_a_method_is_named_by_its_registry_alone() -> None:
    """`dpo` is the program's name too: it counts where something is looked up or chosen by it."""
    names = {method.name for method in methods().values() if method.policy}
    mentions = {
        path: f"{line}: {text!r}"
        for path, source in product()
        for line, text, parent in literals(ast.parse(source))
        if text in names and (text != "dpo" or is_key(parent) or getattr(parent, "arg", None) == "method")
    }
    assert mentions == {}


def test_a_row_of_a_run_is_of_a_stage() -> None:
    name = "measure DPO beta=0.1 seed 0"
    assert (stage_of(name).name, label_of(name)) == ("measure", " DPO beta=0.1 seed 0")
    assert is_stage(name)
    assert not is_stage("of-another-version")
    with pytest.raises(KeyError):
        stage_of("of-another-version")


def test_every_stage_is_whole() -> None:
    for stage in stages().values():
        assert issubclass(stage.facts, Facts)
        assert stage.settings is None or stage.estimate is not None, stage.name


def test_two_stages_of_one_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from tasks.stages import data

    monkeypatch.setattr(data, "AGAIN", Stage("judge", 7, "dataset", Facts), raising=False)
    stages.cache_clear()
    try:
        with pytest.raises(ValueError, match="two stages are called judge"):
            stages()
    finally:
        stages.cache_clear()
