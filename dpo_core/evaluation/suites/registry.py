"""Finds suites by name, among the `SUITES` of this package's modules."""

import importlib
from functools import cache

from dpo_core.evaluation.suite_names import MODULES, module_of
from dpo_core.evaluation.suites.base import Suite


@cache
def find(name: str) -> Suite:
    """The suite of that name; imports the module that defines it.

    Raises:
        RecipeError: there is no such suite.
    """
    module = importlib.import_module(f"{__package__}.{module_of(name)}")
    return next(suite for suite in module.SUITES if suite.name == name)


def suites() -> dict[str, Suite]:
    """All suites."""
    return {name: find(name) for name in MODULES}
