"""The names of all suites and the modules that define them, without importing those."""

from dpo_core.errors import RecipeError

MODULES = {
    "humaneval": "code",
    "mbpp": "code",
    "gsm8k": "gsm8k",
    "hh": "preference",
    "hhh": "preference",
    "llmbar": "preference",
    "pandalm": "preference",
    "xstest": "refusal",
    "advbench": "refusal",
    "truthfulqa_mc": "truthfulqa",
    "truthfulqa_gen": "truthfulqa",
    "scenes": "scenes",
    "scenes_gen": "scenes",
    "scenes_solid": "scenes_solid",
    "geneval": "image_protocols",
    "compbench": "image_protocols",
}
"""Suite name: module of `dpo_core.evaluation.suites` that exports it in `SUITES`."""

PACKAGED = ("scenes", "scenes_gen", "scenes_solid")
"""Suites whose data file comes with this package."""

OF_DENOISERS = ("scenes_solid", "geneval", "compbench")
"""Suites that diffusion models can run."""


def module_of(suite: str) -> str:
    """The module that defines a suite.

    Raises:
        RecipeError: there is no such suite.
    """
    if suite not in MODULES:
        raise RecipeError(f"there is no suite '{suite}'", f"Suites: {', '.join(MODULES)}")
    return MODULES[suite]
