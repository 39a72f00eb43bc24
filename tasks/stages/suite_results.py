"""Cache of suite results: a model is evaluated on a suite once, and every comparison reuses the result."""

import logging
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
from dpo_core.images.protocols import GENEVAL_RESULTS, VQA_RESULTS
from dpo_core.jobs.files import PER_SUITE, ImportJob, NamedModel, SuitesJob
from dpo_core.models.config import ModelConfig
from dpo_core.models.source import locate, source_digest, weights_digest
from dpo_core.system import digest_file, digest_json
from tasks.promotion.model_source import RUNS, report_of, resolve
from tasks.recipe.policies import is_external
from tasks.stages.data import GATES
from tasks.stages.model_jobs import RunJob
from tasks.store.facts import ModelFacts
from tasks.store.files import CACHE_FOLDER, CONVERT_MODEL, SUITE_RESULTS, disk_errors, path_of
from tasks.store.manifest import stage_key
from tasks.store.store import ArtifactInfo, Store

log = logging.getLogger("dpo")

Place = tuple[str, str]
"""The names of a model and of a suite."""


@dataclass(frozen=True)
class SuiteRequest:
    """Models, and the suites on which each of them is evaluated."""

    models: Sequence[NamedModel]
    files: dict[str, Path]
    """By suite."""
    config: SuiteConfig
    reference: NamedModel | None = None

    @cached_property
    def keys(self) -> dict[Place, str]:
        """SHA-256 of everything that decides each result; the suites of a model are consecutive."""
        common: dict[str, Any] = {
            "reference": source_digest(Path(self.reference.path)) if self.reference else None,
            "config": self.config,
            "classifier": identity(self.config.classifier) if self.config.classifier else None,
            "harness": _version("lm-eval"),
        }
        if self.config.images:
            common["results"] = _results(Path(self.config.images))
        data = {name: data_digest(find(name), file) for name, file in self.files.items()}
        keys = {}
        for model in self.models:
            own = {"model": source_digest(Path(model.path)), "tokens": model.tokens}
            for name in self.files:
                of_suite = {"suite": name, "version": find(name).version, "data": data[name]}
                keys[model.name, name] = digest_json(common | own | of_suite)
        return keys


def suite_results(
    request: SuiteRequest, workspace: Path, run: RunJob
) -> tuple[dict[Place, SuiteResult], set[Place]]:
    """Results of every model on every suite, and the places of cached ones. One job computes the others."""
    cached = {}
    for place, key in request.keys.items():
        if result := _read(_path(workspace, place, key)):
            cached[place] = result.model_copy(update={"model": place[0]})
    missing = [place for place in request.keys if place not in cached]
    computed = _compute(request, missing, workspace, run) if missing else {}
    for place, result in computed.items():
        path = _path(workspace, place, request.keys[place])
        with disk_errors(workspace, "writing the result of a suite"):
            write_checked(path, result.model_dump(mode="json"))
    both = cached | computed
    return {place: both[place] for place in request.keys}, set(cached)


def _compute(
    request: SuiteRequest, missing: list[Place], workspace: Path, run: RunJob
) -> dict[Place, SuiteResult]:
    def job(fields: dict[str, Any]) -> SuitesJob:
        return SuitesJob(
            **fields,
            models=list(request.models),
            model_suites=missing,
            files={name: str(file) for name, file in request.files.items()},
            config=request.config,
            reference=request.reference,
            caches=str(workspace / CACHE_FOLDER),
        )

    # With the places, because two models of the same content have one key and still need two results.
    key = digest_json([[place, request.keys[place]] for place in missing])
    listed = run(key, job, PER_SUITE * len(missing))["results"]
    return dict(zip(missing, map(SuiteResult.model_validate, listed), strict=True))


def _path(workspace: Path, place: Place, key: str) -> Path:
    return workspace / SUITE_RESULTS / f"{place[1]}-{key[:24]}.json"


def _results(images: Path) -> dict[str, str]:
    """Digests of the results that other scripts wrote of images, by their place."""
    files = [file for name in (GENEVAL_RESULTS, VQA_RESULTS) for file in sorted(images.rglob(name))]
    return {str(file.relative_to(images)): digest_file(file) for file in files}


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
        log.warning("the cached result %s was written by another version; the suite is run again", path)
        return None


def find_model(spec: str, workspace: Path) -> Path:
    """The files of a model: a checkpoint folder, or files that `checkpoint_of` can convert.

    Args:
        spec: as `model.name` in a recipe; or a finished run of the workspace without `runs:/`, its policy
            after a colon: `demo-20261125-224737:PPO`.

    Raises:
        RecipeError: there is no such run, policy or registered version, or its files are damaged.
        ModelError: there is no such model.
    """
    name = trained_name(spec, workspace)
    if is_external(name):
        return resolve(name, workspace).path
    return locate(ModelConfig(name=name))


def checkpoint_of(spec: str, workspace: Path, run: RunJob) -> Path:
    """The checkpoint folder of a model; other formats are converted in a job.

    Arguments and errors are those of `find_model`.
    """
    source = find_model(spec, workspace)
    if source.is_dir() and not (source / "adapter_config.json").exists():
        return source
    return _converted(spec, source, workspace, run)


def trained_name(spec: str, workspace: Path) -> str:
    """`runs:/RUN/POLICY` for `RUN:POLICY` if the workspace has that run; else the name unchanged."""
    run, colon, policy = spec.partition(":")
    folder = workspace / "runs" / run
    if "/" in run or not any((folder / file).is_file() for file in ("run.json", "report.json")):
        return spec
    return f"{RUNS}{run}/{policy}" if colon else f"{RUNS}{run}"


def trained_rows(spec: str, workspace: Path) -> Path | None:
    """The table of rows that a run's policies were trained on; None for other models or a missing table."""
    name = trained_name(spec, workspace)
    if not name.startswith(RUNS):
        return None
    stages = {row.name: row for row in report_of(name, workspace).stages}
    row = stages.get(GATES["pairs"].name) or stages.get(GATES["unpaired"].name)
    folder = path_of(row.uri or "") if row else None
    return folder / "data.parquet" if folder and (folder / "data.parquet").is_file() else None


def objective_of(spec: str, workspace: Path) -> str:
    """The objective, or else the method, of a run's policy; empty for other models."""
    name = trained_name(spec, workspace)
    if not name.startswith(RUNS):
        return ""
    report = report_of(name, workspace)
    policy = name.removeprefix(RUNS).partition("/")[2] or report.candidate
    policies = {name.casefold(): about for name, about in report.policies.items()}
    about = policies.get(policy.casefold())
    return about.objective or about.method if about else ""


def _converted(spec: str, source: Path, workspace: Path, run: RunJob) -> Path:
    """Convert a model to a checkpoint folder, or return the folder of an earlier conversion."""
    store, source_sha256 = Store(workspace), source_digest(source)
    config = digest_json({"source": source_sha256})
    key = stage_key(CONVERT_MODEL, 1, config, [])
    with store.lock(CONVERT_MODEL, key):
        manifest = store.lookup(CONVERT_MODEL, key)
        if manifest is None:
            out = store.begin(CONVERT_MODEL, key) / "out"
            model = ModelConfig(name=spec)
            run(source_sha256, lambda fields: ImportJob(**fields, model=model, out=str(out)), 1)
            facts = ModelFacts(weights_sha256=weights_digest(out)).as_extra()
            manifest = store.commit(CONVERT_MODEL, key, out, ArtifactInfo("model", 1, config, extra=facts))
    return manifest.path
