"""Runs a suite on a model, and recomputes its measures without contaminated items."""

import time
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_core.errors import RecipeError
from dpo_core.evaluation.config import SuiteConfig, SuitesConfig
from dpo_core.evaluation.contamination import TrainingText
from dpo_core.evaluation.results import MeasureSpec, SuiteResult, compute_measures
from dpo_core.evaluation.suites.base import Suite
from dpo_core.evaluation.suites.registry import find
from dpo_core.system import digest_file, digest_text

if TYPE_CHECKING:
    from dpo_core.evaluation.model_under_test import ModelUnderTest


def suite_files(config: SuitesConfig) -> dict[str, Path]:
    """The data file of each suite, after all checks that need no model.

    Raises:
        RecipeError: a file or a package is missing, or running code is not allowed.
    """
    for name in config.names:
        find(name).check(config.settings)
    return {name: data_file(find(name), Path(config.data or ".").expanduser()) for name in config.names}


def data_file(suite: Suite, data: Path) -> Path:
    """The suite's file: `data` itself, or a file with one of its usual names in `data` or one folder below.

    Raises:
        RecipeError: there is none.
    """
    if suite.packaged:
        return suite.packaged
    if data.is_file():
        return data
    if not data.is_dir():
        raise RecipeError(f"there is no folder {data}", f"Name the folder with {suite.files[0]}")
    for name in suite.files:
        for place in (data / name, *sorted(data.glob(f"*/{name}"))):
            if place.is_file():
                return place
    raise RecipeError(
        f"the data file {suite.files[0]} of the suite {suite.name} is not in {data}",
        f"Get it from {suite.source}, and name its folder with --data",
    )


def data_digest(suite: Suite, file: Path) -> str:
    """sha256 of the suite's file, or of the digests of its files if there are several."""
    digests = [digest_file(path) for path in (file, *suite.extra_files(file))]
    return digests[0] if len(digests) == 1 else digest_text("".join(digests))


def run_suite(suite: Suite, subject: "ModelUnderTest", file: Path, config: SuiteConfig) -> SuiteResult:
    """Run the suite on the subject and compute its measures. Every rank of the subject calls this."""
    started = time.monotonic()
    rows = suite.read(file)
    outcome = suite.run(subject, rows, config)
    return SuiteResult(
        suite=suite.name,
        model=subject.name,
        weights_sha256=subject.weights,
        data={"file": file.name, "sha256": data_digest(suite, file), "rows": len(rows)},
        settings={"version": suite.version, "seed": config.seed, "limit": config.limit, **outcome.settings},
        measures=[*compute_measures(outcome.items, outcome.specs, seed=config.seed), *outcome.others],
        items=outcome.items,
        facts=outcome.facts,
        seconds=time.monotonic() - started,
    )


def mark_contaminated(result: SuiteResult, training: TrainingText) -> SuiteResult:
    """The result with the ids of contaminated items, and `clean` measures without them."""
    matches = training.find(result.items)
    specs = [
        MeasureSpec(**{name: getattr(measure, name) for name in MeasureSpec.model_fields})
        for measure in result.measures
        if measure.paired and not measure.subset
    ]
    again = compute_measures(result.items, specs, seed=int(str(result.settings["seed"])), without=matches)
    others = [measure for measure in result.measures if not measure.paired]
    return result.model_copy(
        update={
            "measures": [*again, *others],
            "contaminated": matches,
            "facts": {**result.facts, "contaminated": len(matches)},
        }
    )
