"""Registry of the methods: the `METHOD` of each module of this package, by name."""

import difflib
from functools import cache

from dpo_core import methods as package
from dpo_core.errors import RecipeError
from dpo_core.methods.method import Method
from dpo_core.system import import_modules


@cache
def methods() -> dict[str, Method]:
    """All methods, those that a policy may name first."""
    modules = import_modules(package, without=("registry",))
    known = [module.METHOD for module in modules if hasattr(module, "METHOD")]
    return {method.name: method for method in sorted(known, key=lambda m: (not m.policy, m.name))}


def get(name: str) -> Method:
    """The method of that name.

    Raises:
        RecipeError: there is none.
    """
    known = methods()
    if name not in known:
        near = difflib.get_close_matches(name.lower(), known, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        names = ", ".join(method.name for method in known.values() if method.policy)
        raise RecipeError(f"there is no method '{name}'{hint}", f"Methods: {names}; see dpo methods")
    return known[name]
