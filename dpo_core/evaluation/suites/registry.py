"""The suites by name: what the modules of this package export as `SUITES`."""

from functools import cache

from dpo_core.errors import RecipeError
from dpo_core.evaluation import suites as package
from dpo_core.evaluation.suites.base import Suite
from dpo_core.system import modules_of


def find(name: str) -> Suite:
    """The suite of that name.

    Raises:
        RecipeError: there is none.
    """
    known = suites()
    if name not in known:
        raise RecipeError(f"there is no suite '{name}'", f"Suites: {', '.join(known)}")
    return known[name]


@cache
def suites() -> dict[str, Suite]:
    """All suites."""
    modules = modules_of(package, without=("registry",))
    return {suite.name: suite for module in modules for suite in getattr(module, "SUITES", ())}
