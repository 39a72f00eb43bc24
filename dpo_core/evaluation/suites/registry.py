"""The suites by name: what the modules of this package export as `SUITES`."""

import importlib
from functools import cache

from dpo_core.evaluation.suite_names import MODULES, module_of
from dpo_core.evaluation.suites.base import Suite


@cache
def find(name: str) -> Suite:
    """The suite of that name; imports the module that defines it.

    Raises:
        RecipeError: there is none.
    """
    module = importlib.import_module(f"{__package__}.{module_of(name)}")
    return next(suite for suite in module.SUITES if suite.name == name)


def suites() -> dict[str, Suite]:
    """All suites."""
    return {name: find(name) for name in MODULES}
