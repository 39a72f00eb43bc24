"""The table of suite names matches the suites that the modules export."""

from dpo_core.evaluation import suites as package
from dpo_core.evaluation.suite_names import MODULES
from dpo_core.evaluation.suites.registry import find, suites
from dpo_core.system import import_modules


def test_every_suite_that_a_module_exports_is_in_the_table_of_names():
    modules = import_modules(package)
    exported = {
        suite.name: module.__name__.rpartition(".")[2]
        for module in modules
        for suite in getattr(module, "SUITES", ())
    }
    assert exported == MODULES
    assert [suite.name for suite in suites().values()] == list(MODULES)
    assert find("hh").title == "HH harmlessness"
