"""The stages by name: what the modules of this package export as a `Stage`, alone or in a mapping."""

from collections.abc import Iterator, Mapping
from functools import cache
from types import ModuleType

from dpo_core.system import modules_of
from tasks import stages as package
from tasks.stages.base import Stage


@cache
def stages() -> dict[str, Stage]:
    """All stages, by name.

    Raises:
        ValueError: two stages have one name.
    """
    known: dict[str, Stage] = {}
    for module in modules_of(package):
        for stage in _exported(module):
            if known.setdefault(stage.name, stage) is not stage:
                raise ValueError(f"two stages are called {stage.name}: give one of them another name")
    return known


def _exported(module: ModuleType) -> Iterator[Stage]:
    for value in vars(module).values():
        for one in value.values() if isinstance(value, Mapping) else (value,):
            if isinstance(one, Stage):
                yield one


def is_stage(row: str) -> bool:
    """Whether a row of a run is of a stage of this version."""
    return row.partition(" ")[0] in stages()


def stage_of(row: str) -> Stage:
    """The stage of a row of a run: of `measure DPO beta=0.1 seed 0` the stage `measure`.

    Raises:
        KeyError: a stage of an earlier version.
    """
    return stages()[row.partition(" ")[0]]


def label_of(row: str) -> str:
    """What tells the row from others of its stage, with the space before it: ` DPO beta=0.1 seed 0`."""
    return row.removeprefix(stage_of(row).name)
