"""Results of suites by what they depend on: a model is asked once and not again for every comparison."""

import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pydantic import ValidationError

from dpo_core.errors import RecipeError
from dpo_core.evaluation.results import SuiteResult
from dpo_core.evaluation.running import data_digest, run_suite
from dpo_core.evaluation.safety import identity
from dpo_core.evaluation.subject import Subject
from dpo_core.evaluation.suites import Suite, SuiteConfig
from dpo_core.models import ModelConfig, convert, locate, source_digest
from tasks.champion import registered_weights, require_whole
from tasks.manifest import digest_config, digest_folder
from tasks.report import RunReport
from tasks.sealed import read_sealed, write_sealed
from tasks.workspace import disk_errors, remove

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
        write_sealed(path, result.model_dump(mode="json"))
    return result, False


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _read(path: Path) -> SuiteResult | None:
    facts = read_sealed(path, "the suite is run again")
    try:
        return None if facts is None else SuiteResult.model_validate(facts)
    except ValidationError:
        log.warning("the result %s is of another version; the suite is run again", path)
        return None


def find_model(spec: str, workspace: Path) -> Path:
    """The checkpoint folder of a model.

    Args:
        spec: a checkpoint folder, a .gguf file, `package:name`, a hub name; a registered model,
            `models:/NAME@ALIAS`; or a finished run of the workspace, its policy after a colon where it is not
            DPO: `demo-20261125-224737:PPO`.

    Raises:
        RecipeError: the run has no such policy.
        ModelError: nothing is there.
    """
    run, _, policy = spec.partition(":")
    report = workspace / "runs" / run / "report.json"
    if report.is_file():
        return _of_run(run, policy or "DPO", report)
    if spec.startswith("models:/"):
        return registered_weights(spec, workspace)
    source = locate(ModelConfig(name=spec))
    if source.is_dir() and not (source / "adapter_config.json").exists():
        return source
    return _converted(spec, source, workspace)


_STAGES = {"SFT": ("prepare-sft", "import-model"), "DPO": ("train-dpo",), "PPO": ("train-ppo",),
           "Online DPO": ("train-online",)}  # fmt: skip
_GROUP = ("train-grpo",)


def _of_run(run: str, policy: str, report: Path) -> Path:
    try:
        stages = {row.name: row for row in RunReport.model_validate_json(report.read_bytes()).stages}
    except ValidationError as error:
        raise RecipeError(
            f"the run {run} is no alignment run, or its report is damaged", "Name a model's folder"
        ) from error
    for stage in _STAGES.get(policy, _GROUP):
        row = stages.get(stage)
        if row and row.uri:
            path = Path(row.uri.removeprefix("file://"))
            if not path.is_dir():
                raise RecipeError(f"the model of {run} is gone from {path}", "Run the recipe again")
            require_whole(path, row.sha256, f"the model of {run}")
            return path
    there = ", ".join(p for p, names in _STAGES.items() if any(name in stages for name in names))
    raise RecipeError(f"the run {run} has no policy {policy}", f"It has: {there}")


def _converted(spec: str, source: Path, workspace: Path) -> Path:
    """A model that is no plain checkpoint folder as one, made once."""
    folder = workspace / MODELS / source_digest(source)[:24]
    seal = folder.with_suffix(".json")
    whole = read_sealed(seal, "the model is converted again")
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
                write_sealed(seal, digest_folder(folder))
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return folder
