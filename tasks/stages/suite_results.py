"""Results of suites by what they depend on: a model is asked once and not again for every comparison."""

import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pydantic import ValidationError

from dpo_core.checked_json import read_checked, write_checked
from dpo_core.evaluation.config import SuiteConfig
from dpo_core.evaluation.model_under_test import Subject
from dpo_core.evaluation.results import SuiteResult
from dpo_core.evaluation.run_suite import data_digest, run_suite
from dpo_core.evaluation.suites.base import Suite
from dpo_core.evaluation.suites.safety_classifier import identity
from dpo_core.models.config import ModelConfig
from dpo_core.models.load import convert
from dpo_core.models.source import locate, source_digest
from dpo_core.system import remove
from tasks.promotion.model_source import RUNS, report_of, resolve
from tasks.recipe.policies import elsewhere
from tasks.stages.data import GATES
from tasks.store.files import disk_errors
from tasks.store.manifest import digest_config, digest_folder

log = logging.getLogger("dpo")

FOLDER, MODELS = "evaluations", "models"


def suite_result(
    workspace: Path,
    suite: Suite,
    subject: Subject,
    file: Path,
    config: SuiteConfig,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[SuiteResult, bool]:
    """The subject on a suite, and whether that was known from before."""
    key = digest_config(
        {
            "suite": suite.name,
            "version": suite.version,
            "model": source_digest(subject.path),
            "reference": source_digest(subject.reference.path) if subject.reference else None,
            "data": data_digest(suite, file),
            "config": config,
            "classifier": identity(config.classifier) if config.classifier else None,
            "harness": _version("lm-eval"),
            "tokens": subject.tokens,
        }
    )
    path = workspace / FOLDER / f"{suite.name}-{key[:24]}.json"
    known = _read(path)
    if known:
        return known.model_copy(update={"model": subject.name}), True
    result = run_suite(suite, subject, file, config, progress)
    with disk_errors(workspace, "writing the result of a suite"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_checked(path, result.model_dump(mode="json"))
    return result, False


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _read(path: Path) -> SuiteResult | None:
    facts = read_checked(path, "the suite is run again")
    try:
        return None if facts is None else SuiteResult.model_validate(facts)
    except ValidationError:
        log.warning("the result %s is of another version; the suite is run again", path)
        return None


def find_model(spec: str, workspace: Path) -> Path:
    """The checkpoint folder of a model.

    Args:
        spec: as `model.name` in a recipe; or a finished run of the workspace without `runs:/`, its policy
            after a colon: `demo-20261125-224737:PPO`.

    Raises:
        RecipeError: there is no such run, policy or registered version, or its files are damaged.
        ModelError: nothing is there.
    """
    name = trained_name(spec, workspace)
    if elsewhere(name):
        return resolve(name, workspace).path
    source = locate(ModelConfig(name=name))
    if source.is_dir() and not (source / "adapter_config.json").exists():
        return source
    return _converted(name, source, workspace)


def trained_name(spec: str, workspace: Path) -> str:
    """`runs:/RUN/POLICY` of `RUN:POLICY`, where the workspace has such a run; else the name as it is."""
    run, colon, policy = spec.partition(":")
    folder = workspace / "runs" / run
    if "/" in run or not any((folder / file).is_file() for file in ("run.json", "report.json")):
        return spec
    return f"{RUNS}{run}/{policy}" if colon else f"{RUNS}{run}"


def trained_rows(spec: str, workspace: Path) -> Path | None:
    """The table of rows that a run's policies were trained on; None of other models, or where it is gone."""
    name = trained_name(spec, workspace)
    if not name.startswith(RUNS):
        return None
    stages = {row.name: row for row in report_of(name, workspace).stages}
    row = stages.get(GATES["pairs"].name) or stages.get(GATES["unpaired"].name)
    table = Path(str(row.uri).removeprefix("file://")) / "data.parquet" if row else None
    return table if table and table.is_file() else None


def _converted(spec: str, source: Path, workspace: Path) -> Path:
    """A model that is no plain checkpoint folder as one, made once."""
    folder = workspace / MODELS / source_digest(source)[:24]
    seal = folder.with_suffix(".json")
    whole = read_checked(seal, "the model is converted again")
    if whole is None or not folder.is_dir() or digest_folder(folder) != whole:
        with disk_errors(workspace, "converting a model"):
            folder.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(dir=folder.parent))
            try:
                convert(ModelConfig(name=spec), temporary)
                if folder.exists() or folder.is_symlink():
                    if whole is not None:
                        log.warning("the converted model %s is damaged; it is converted again", folder)
                    remove(folder)
                os.replace(temporary, folder)
                write_checked(seal, digest_folder(folder))
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return folder
