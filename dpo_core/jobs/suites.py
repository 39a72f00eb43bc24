"""Job that runs evaluation suites on models, one model after the other."""

from collections.abc import Callable, Sequence
from itertools import accumulate, groupby, pairwise
from pathlib import Path
from typing import Any

from dpo_core.errors import RecipeError
from dpo_core.evaluation.model_under_test import ModelUnderTest
from dpo_core.evaluation.results import SuiteResult
from dpo_core.evaluation.run_suite import run_suite
from dpo_core.evaluation.suites.registry import find
from dpo_core.jobs.files import PER_SUITE, SuitesJob
from dpo_core.jobs.start import device
from dpo_core.models.folder import is_denoiser
from dpo_core.ranks import JobRanks, Ranks

FILE = SuitesJob


def run(job: SuitesJob, ranks: JobRanks) -> dict[str, Any]:
    """The results in the order of `job.model_suites`.

    Raises:
        RecipeError: the reference has another vocabulary than a model.
    """
    results: list[SuiteResult] = []
    for name, pairs in groupby(job.model_suites, key=lambda pair: pair[0]):
        subject = _subject(job, name, ranks)
        for _, suite in pairs:
            subject.ranks = _SuiteRanks(ranks)
            results.append(run_suite(find(suite), subject, Path(job.files[suite]), job.config))
    return {"results": [result.model_dump(mode="json") for result in results]}


def _subject(job: SuitesJob, name: str, ranks: Ranks) -> ModelUnderTest:
    model, reference = next(model for model in job.models if model.name == name), None
    if job.reference is not None:
        named = job.reference
        reference = ModelUnderTest(Path(named.path), named.name, named.tokens, ranks=ranks)
    subject = ModelUnderTest(
        Path(model.path), name, model.tokens, reference, Path(job.caches), device(), ranks
    )
    if reference and is_denoiser(subject.path) and is_denoiser(reference.path):
        return subject  # it compares images alone
    if reference and reference.tokenizer.get_vocab() != subject.tokenizer.get_vocab():
        raise RecipeError(
            f"the reference {reference.name} has another vocabulary than {name}",
            "Name the model that this one was trained from, or leave the reference out",
        )
    return subject


class _SuiteRanks(Ranks):
    """The ranks of a job during one suite, which counts `PER_SUITE` in the progress of the job.

    The first map runs the model and takes most of the time; only its units are counted.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks, self._counted = ranks, False
        self.rank, self.world = ranks.rank, ranks.world

    def map(
        self,
        name: str,
        units: Sequence[Any],
        compute: Callable[[Any], Any],
        sizes: Sequence[int] | None = None,
    ) -> list[Any]:
        counts = None
        if not self._counted:
            done = [0, *accumulate(sizes or [1] * len(units))]
            counts = [PER_SUITE * b // done[-1] - PER_SUITE * a // done[-1] for a, b in pairwise(done)]
            self._counted = True
        return self._ranks.map(name, units, compute, counts)

    def check(self) -> None:
        self._ranks.check()

    def discard_results(self) -> None:
        self._ranks.discard_results()

    def advance(self, size: int) -> None:
        """Log-probs of the reference are not counted."""

    def wait_until(self, complete: Callable[[], bool]) -> None:
        self._ranks.wait_until(complete)
