"""Results of suites by what they depend on: a model is asked once and not again for every comparison."""

import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dpo_core.checked_json import read_checked, write_checked
from dpo_core.evaluation.config import SuiteConfig
from dpo_core.evaluation.results import SuiteResult
from dpo_core.evaluation.run_suite import data_digest
from dpo_core.evaluation.safety_classifier import identity
from dpo_core.evaluation.suites.registry import find
from dpo_core.jobs.files import PER_SUITE, AskedModel, ImportJob, SuitesJob
from dpo_core.models.config import ModelConfig
from dpo_core.models.source import locate, source_digest
from dpo_core.system import remove
from tasks.promotion.model_source import RUNS, report_of, resolve
from tasks.recipe.policies import elsewhere
from tasks.stages.asking import RunJob
from tasks.stages.data import GATES
from tasks.store.files import CACHE_FOLDER, disk_errors
from tasks.store.manifest import digest_config, digest_folder

log = logging.getLogger("dpo")

FOLDER, MODELS = "evaluations", "models"


Place = tuple[str, str]
"""The names of a model and of a suite."""


@dataclass(frozen=True)
class SuiteRequest:
    """Models, and the suites that each of them is put through."""

    models: Sequence[AskedModel]
    files: dict[str, Path]
    """By suite."""
    config: SuiteConfig
    reference: AskedModel | None = None

    @cached_property
    def keys(self) -> dict[Place, str]:
        """SHA-256 of what decides each result, the suites of a model side by side."""
        common = {
            "reference": source_digest(Path(self.reference.path)) if self.reference else None,
            "config": self.config,
            "classifier": identity(self.config.classifier) if self.config.classifier else None,
            "harness": _version("lm-eval"),
        }
        data = {name: data_digest(find(name), file) for name, file in self.files.items()}
        keys = {}
        for model in self.models:
            own = {"model": source_digest(Path(model.path)), "tokens": model.tokens}
            for name in self.files:
                of_suite = {"suite": name, "version": find(name).version, "data": data[name]}
                keys[model.name, name] = digest_config(common | own | of_suite)
        return keys


def suite_results(
    request: SuiteRequest, workspace: Path, run: RunJob
) -> tuple[dict[Place, SuiteResult], set[Place]]:
    """Every model on every suite, and which of these were known from before; one job computes the others."""
    known = {}
    for place, key in request.keys.items():
        if result := _read(_path(workspace, place, key)):
            known[place] = result.model_copy(update={"model": place[0]})
    missing = [place for place in request.keys if place not in known]
    computed = _compute(request, missing, workspace, run) if missing else {}
    for place, result in computed.items():
        path = _path(workspace, place, request.keys[place])
        with disk_errors(workspace, "writing the result of a suite"):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_checked(path, result.model_dump(mode="json"))
    both = known | computed
    return {place: both[place] for place in request.keys}, set(known)


def _compute(
    request: SuiteRequest, missing: list[Place], workspace: Path, run: RunJob
) -> dict[Place, SuiteResult]:
    def job(fields: dict[str, Any]) -> SuitesJob:
        return SuitesJob(
            **fields,
            models=list(request.models),
            asked=missing,
            files={name: str(file) for name, file in request.files.items()},
            config=request.config,
            reference=request.reference,
            caches=str(workspace / CACHE_FOLDER),
        )

    # Not the keys alone: what was asked of models that have become one is two results.
    key = digest_config([[place, request.keys[place]] for place in missing])
    listed = run(key, job, PER_SUITE * len(missing))["results"]
    return dict(zip(missing, map(SuiteResult.model_validate, listed), strict=True))


def _path(workspace: Path, place: Place, key: str) -> Path:
    return workspace / FOLDER / f"{place[1]}-{key[:24]}.json"


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
    """The files of a model: a checkpoint folder, or what `checkpoint_of` makes one of.

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
    return locate(ModelConfig(name=name))


def checkpoint_of(spec: str, workspace: Path, run: RunJob) -> Path:
    """The checkpoint folder of a model; one that is none yet is converted in a job.

    Arguments and errors: `find_model`.
    """
    source = find_model(spec, workspace)
    if source.is_dir() and not (source / "adapter_config.json").exists():
        return source
    return _converted(spec, source, workspace, run)


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


def _converted(spec: str, source: Path, workspace: Path, run: RunJob) -> Path:
    """A model that is no plain checkpoint folder as one, made once."""
    folder = workspace / MODELS / source_digest(source)[:24]
    seal = folder.with_suffix(".json")
    whole = read_checked(seal, "the model is converted again")
    if whole is None or not folder.is_dir() or digest_folder(folder) != whole:
        with disk_errors(workspace, "converting a model"):
            folder.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(dir=folder.parent))
            try:
                model, out = ModelConfig(name=spec), str(temporary)
                run(source_digest(source), lambda fields: ImportJob(**fields, model=model, out=out), 1)
                if folder.exists() or folder.is_symlink():
                    if whole is not None:
                        log.warning("the converted model %s is damaged; it is converted again", folder)
                    remove(folder)
                os.replace(temporary, folder)
                write_checked(seal, digest_folder(folder))
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return folder
