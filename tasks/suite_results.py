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
from tasks.champion import registered_weights
from tasks.manifest import digest_config
from tasks.report import RunReport
from tasks.workspace import disk_errors, write_whole

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
        write_whole(path, result.model_dump_json())
    return result, False


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _read(path: Path) -> SuiteResult | None:
    if not path.is_file():
        return None
    try:
        return SuiteResult.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        log.warning("the result %s is damaged or of another version; the suite is run again", path)
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
            return path
    there = ", ".join(p for p, names in _STAGES.items() if any(name in stages for name in names))
    raise RecipeError(f"the run {run} has no policy {policy}", f"It has: {there}")


def _converted(spec: str, source: Path, workspace: Path) -> Path:
    """A model that is no plain checkpoint folder as one, made once."""
    folder = workspace / MODELS / source_digest(source)[:24]
    if not folder.is_dir():
        with disk_errors(workspace, "converting a model"):
            folder.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(dir=folder.parent))
            try:
                convert(ModelConfig(name=spec), temporary)
                os.replace(temporary, folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return folder
