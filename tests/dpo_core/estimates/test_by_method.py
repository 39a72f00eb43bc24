"""Every method has an estimate, and every one that can read cached log-probs lists its sequences."""

from dpo_core.estimates.by_method import ESTIMATES
from dpo_core.examples.cached import CACHED
from dpo_core.methods.registry import methods


def test_every_method_has_an_estimate() -> None:
    assert ESTIMATES.keys() == methods().keys()


def test_every_method_that_reads_cached_log_probs_lists_its_sequences() -> None:
    reads = {name for name, method in methods().items() if method.reference(method.settings()) == "cached"}
    assert CACHED.keys() == reads
