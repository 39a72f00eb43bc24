"""Running one suite on one model: find the file, ask, measure, and again without what was trained on."""

import hashlib
import time
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_core.errors import RecipeError
from dpo_core.evaluation.config import SuiteConfig, SuitesConfig
from dpo_core.evaluation.contamination import TrainingText
from dpo_core.evaluation.results import MeasureSpec, SuiteResult, measured
from dpo_core.evaluation.suites.base import Suite
from dpo_core.evaluation.suites.registry import find
from dpo_core.system import digest_file

if TYPE_CHECKING:
    from dpo_core.evaluation.model_under_test import Subject


def suite_files(config: SuitesConfig) -> dict[str, Path]:
    """The file of each suite. Refuses what running it would refuse.

    Raises:
        RecipeError: a file or a package is missing, or code may not be run.
    """
    for name in config.names:
        find(name).check(config.settings)
    return {name: data_file(find(name), Path(config.data or ".").expanduser()) for name in config.names}


def data_file(suite: Suite, data: Path) -> Path:
    """The suite's file: `data` itself, or the file of a usual name in it or one folder below.

    Raises:
        RecipeError: there is none.
    """
    if data.is_file():
        return data
    if not data.is_dir():
        raise RecipeError(f"there is no folder {data}", f"Name the folder that holds {suite.files[0]}")
    for name in suite.files:
        for place in (data / name, *sorted(data.glob(f"*/{name}"))):
            if place.is_file():
                return place
    raise RecipeError(
        f"the suite {suite.name} finds no {suite.files[0]} in {data}",
        f"Get it from {suite.source}, and name its folder with --data",
    )


def data_digest(suite: Suite, file: Path) -> str:
    """sha256 of all that the suite reads: of its file, or of the digests where there are several."""
    digests = [digest_file(path) for path in (file, *suite.beside(file))]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def run_suite(suite: Suite, subject: "Subject", file: Path, config: SuiteConfig) -> SuiteResult:
    """Ask the subject, and measure what came of it. Every rank of the subject calls this."""
    started = time.monotonic()
    rows = suite.read(file)
    outcome = suite.run(subject, rows, config)
    return SuiteResult(
        suite=suite.name,
        model=subject.name,
        weights_sha256=subject.weights,
        data={"file": file.name, "sha256": data_digest(suite, file), "rows": len(rows)},
        settings={"version": suite.version, "seed": config.seed, "limit": config.limit, **outcome.settings},
        measures=[*measured(outcome.items, outcome.specs, seed=config.seed), *outcome.others],
        items=outcome.items,
        facts=outcome.facts,
        seconds=time.monotonic() - started,
    )


def without_training_data(result: SuiteResult, training: TrainingText) -> SuiteResult:
    """The result with the items named that stand in the training data; measures also without them."""
    found = training.find(result.items)
    specs = [
        MeasureSpec(**{name: getattr(measure, name) for name in MeasureSpec.model_fields})
        for measure in result.measures
        if measure.paired and not measure.subset
    ]
    again = measured(result.items, specs, seed=int(str(result.settings["seed"])), without=found)
    others = [measure for measure in result.measures if not measure.paired]
    return result.model_copy(
        update={
            "measures": [*again, *others],
            "contaminated": found,
            "facts": {**result.facts, "contaminated": len(found)},
        }
    )
