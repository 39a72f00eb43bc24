"""The suites by name."""

from dpo_core.errors import RecipeError
from dpo_core.evaluation.suites import code, gsm8k, preference, refusal, truthfulqa
from dpo_core.evaluation.suites.base import Suite


def find(name: str) -> Suite:
    """The suite of that name.

    Raises:
        RecipeError: there is none.
    """
    known = suites()
    if name not in known:
        raise RecipeError(f"there is no suite '{name}'", f"Suites: {', '.join(known)}")
    return known[name]


def suites() -> dict[str, Suite]:
    """All suites by name: what `SUITES` of the modules of this package list."""
    modules = (preference, truthfulqa, gsm8k, code, refusal)
    return {suite.name: suite for module in modules for suite in module.SUITES}
