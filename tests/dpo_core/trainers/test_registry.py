"""Every method has a trainer of its name."""

from dpo_core import trainers as package
from dpo_core.methods.registry import methods
from dpo_core.system import import_modules


def test_methods_and_trainers_have_the_same_names() -> None:
    modules = import_modules(package)
    built = {module.__name__.rpartition(".")[2] for module in modules if hasattr(module, "build")}
    assert built == methods().keys()
