"""No function takes more than seven parameters, but for tensors: what belongs together has a name."""

import ast

from tests.test_state import modules

MOST = 7

LONG = {
    "dpo_core/scoring/attention.py:_by_document": "tensors and keywords, as transformers hands them",
    "dpo_core/scoring/branch_scores.py:token_scores": "tensors",
    "dpo_core/scoring/lm_head.py:forward": "tensors, as torch.autograd.Function hands them",
    "dpo_core/objectives/registry.py:objective": "the fields of a registered objective, each by its name",
    "dpo_core/trainers/dpo.py:__init__": "the model, its examples and its reference in one of three forms",
    "flows/cli/evaluate.py:compare": "options of a command",
    "flows/cli/evaluate.py:evaluate": "options of a command",
}
"""Functions that take more, and why."""


def long_functions(module: ast.Module) -> set[str]:
    names = set()
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = node.args
            listed = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
            count = len(listed) - (listed[:1] in (["self"], ["cls"]))
            if count > MOST:
                names.add(node.name)
    return names


def test_no_list_of_parameters_is_long() -> None:
    long = {f"{path}:{name}" for path, module in modules() for name in long_functions(module)}
    assert long == LONG.keys(), "group what belongs together, or name the function in LONG with the reason"


def test_long_lists_are_recognised() -> None:
    listed = ", ".join(f"a{i}" for i in range(MOST))
    assert long_functions(ast.parse(f"def f(self, {listed}): pass\ndef g({listed}, *, b): pass")) == {"g"}
