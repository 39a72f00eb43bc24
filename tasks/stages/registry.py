"""Look up stages by name: every `Stage` that a module of this package exports, alone or in a mapping."""

from collections.abc import Iterator, Mapping
from functools import cache
from types import ModuleType

from dpo_core.system import import_modules
from tasks import stages as package
from tasks.stages.base import Stage


@cache
def stages() -> dict[str, Stage]:
    """All stages, by name.

    Raises:
        ValueError: two stages have one name.
    """
    by_name: dict[str, Stage] = {}
    for module in import_modules(package):
        for stage in _exported(module):
            if by_name.setdefault(stage.name, stage) is not stage:
                raise ValueError(f"two stages are called {stage.name}: give one of them another name")
    return by_name


def _exported(module: ModuleType) -> Iterator[Stage]:
    for value in vars(module).values():
        for item in value.values() if isinstance(value, Mapping) else (value,):
            if isinstance(item, Stage):
                yield item


def is_stage(row: str) -> bool:
    """True if this version has the stage of a row of a run."""
    return row.partition(" ")[0] in stages()


def stage_of(row: str) -> Stage:
    """The stage of a row of a run: `measure` for `measure DPO beta=0.1 seed 0`.

    Raises:
        KeyError: this version has no such stage.
    """
    return stages()[row.partition(" ")[0]]


def label_of(row: str) -> str:
    """The label of a row, with the space before it: ` DPO beta=0.1 seed 0`."""
    return row.removeprefix(stage_of(row).name)
