"""Nothing is kept in variables of modules, or passed on through the environment of the same process.

Two runs, or two threads, of one process would share it, and no signature would say so. What a run keeps is in
its `Context` or in an object that the context leads to.
"""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
PACKAGES = ("dpo_core", "expectations", "tasks", "flows", "deploy")

STATE = {
    # What a worker may read must hold also where a caller knows nothing of it.
    "dpo_core/data/files/confined.py:_allowed",
    # Code that may run becomes modules of the process; without an entry none runs.
    "dpo_core/models/remote_code.py:_trusted",
    # One thread of the process at a time: the library keeps state of its own in its modules.
    "dpo_core/models/transformers_lock.py:_LOCK",
    "expectations/gate.py:_ONE_AT_A_TIME",
    # A registry, which the modules of objectives fill while they are imported.
    "dpo_core/objectives/registry.py:_OBJECTIVES",
    # One server for each process; it ends with the process.
    "flows/process/temporary_server.py:_server",
    # Numbers the jobs of a process, so that each has a key of its own in torch's store, which outlives them.
    "dpo_core/training/liveness.py:_starts",
}
"""Module state that stays, and why."""

ENVIRONMENT = {
    "dpo_core/models/accelerator.py": "read by DeepSpeed",
    "dpo_core/training/checkpoints.py": "read by torch.load",
    "dpo_core/training/distributed.py": "read by torch.distributed",
    "expectations/__init__.py": "read by Great Expectations",
    "flows/commands/doctor.py": "read by MLflow's client",
    "flows/process/environment.py": "read by libraries and by child processes",
    "flows/process/temporary_server.py": "read by Prefect's clients, also in the threads of tasks",
    "tasks/tracking/connection.py": "read by MLflow's client",
}
"""Modules that set variables of the environment, and who reads them."""

_CONTAINERS = {"set", "dict", "list", "deque", "defaultdict", "Counter", "OrderedDict"}
_STATEFUL = {
    "count",
    "cycle",
    "Event",
    "Lock",
    "RLock",
    "Condition",
    "Semaphore",
    "local",
    "Queue",
    "ContextVar",
}
_CHANGES = {
    "add", "append", "appendleft", "clear", "discard", "extend", "insert", "pop", "popitem", "remove", "set",
    "setdefault", "update",
}  # fmt: skip
_SETTERS = {"setdefault", "update", "pop", "clear", "popitem"}


@functools.cache
def modules() -> list[tuple[str, ast.Module]]:
    paths = [path for package in PACKAGES for path in sorted((REPO / package).rglob("*.py"))]
    return [(path.relative_to(REPO).as_posix(), ast.parse(path.read_text())) for path in paths]


def _name_of(call: ast.expr) -> str:
    function = call.func if isinstance(call, ast.Call) else None
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _variables(module: ast.Module) -> Iterator[tuple[str, ast.expr]]:
    """The variables of a module with their first values."""
    for statement in module.body:
        if isinstance(statement, ast.Assign):
            yield from ((t.id, statement.value) for t in statement.targets if isinstance(t, ast.Name))
        elif (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and statement.value
        ):
            yield statement.target.id, statement.value


def _made_to_change(value: ast.expr, own_classes: set[str]) -> bool:
    """Whether a value is empty at first, or an object that keeps something."""
    if isinstance(value, ast.Dict | ast.List | ast.Set):
        return not (value.keys if isinstance(value, ast.Dict) else value.elts)
    if not isinstance(value, ast.Call):
        return False
    name = _name_of(value)
    return name in _STATEFUL | own_classes or (name in _CONTAINERS and not value.args and not value.keywords)


def _changed(function: ast.AST) -> Iterator[str]:
    """Names whose value a function changes in place, other than its own variables."""
    own = {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    own |= {n.arg for n in ast.walk(function) if isinstance(n, ast.arg)}
    for node in ast.walk(function):
        target: ast.expr | None = None
        if isinstance(node, ast.Attribute | ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
            target = node.value
        elif (
            isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _CHANGES
        ):
            target = node.func.value
        if isinstance(target, ast.Name) and target.id not in own:
            yield target.id


def module_state(module: ast.Module) -> set[str]:
    """Variables of a module that change while the program runs."""
    stateful_classes = {
        c.name
        for c in module.body
        if isinstance(c, ast.ClassDef) and any(getattr(f, "name", "") == "__init__" for f in c.body)
    }
    variables = dict(_variables(module))
    functions = [n for n in ast.walk(module) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    changed = {name for function in functions for name in _changed(function)} & variables.keys()
    rebound = {name for n in ast.walk(module) if isinstance(n, ast.Global) for name in n.names}
    return changed | rebound | {n for n, v in variables.items() if _made_to_change(v, stateful_classes)}


def sets_environment(module: ast.Module) -> bool:
    """Whether a module changes the environment of its process."""

    def is_environment(node: ast.AST) -> bool:
        return isinstance(node, ast.Attribute) and node.attr == "environ"

    for node in ast.walk(module):
        if (
            isinstance(node, ast.Subscript)
            and not isinstance(node.ctx, ast.Load)
            and is_environment(node.value)
        ):
            return True
        if isinstance(node, ast.AugAssign) and is_environment(node.target):
            return True
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            setter = node.func.attr in _SETTERS and is_environment(node.func.value)
            if setter or node.func.attr in {"putenv", "unsetenv"}:
                return True
    return False


def test_no_module_keeps_state() -> None:
    kept = {f"{path}:{name}" for path, module in modules() for name in module_state(module)}
    assert kept == STATE, "put it into the run's context, or name it in STATE with a reason"


def test_no_setting_travels_through_the_environment() -> None:
    setting = {path for path, module in modules() if sets_environment(module)}
    assert setting == ENVIRONMENT.keys(), "pass it as an argument, or name its reader in ENVIRONMENT"
