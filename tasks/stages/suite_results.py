"""Results of suites by what they depend on: a model is asked once and not again for every comparison."""

import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pydantic import ValidationError

from dpo_core.errors import RecipeError
from dpo_core.evaluation.model_under_test import Subject
from dpo_core.evaluation.results import SuiteResult
from dpo_core.evaluation.run_suite import data_digest, run_suite
from dpo_core.evaluation.suites.base import Suite, SuiteConfig
from dpo_core.evaluation.suites.safety_classifier import identity
from dpo_core.models.load import ModelConfig, convert, locate, source_digest
from tasks.promotion.champion import NAME, registered_weights, require_whole
from tasks.reports.run_report import RunReport, StageRow
from tasks.store.checked_json import read_sealed, write_sealed
from tasks.store.files import disk_errors, remove
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
            DPO: `demo-20261125-224737:PPO`, in capitals or not.

    Raises:
        RecipeError: the run has no such policy, or is not finished.
        ModelError: nothing is there.
    """
    run, colon, policy = spec.partition(":")
    folder = workspace / "runs" / run
    if "/" not in run and (folder / "report.json").is_file():
        return _of_run(run, policy if colon else "DPO", folder / "report.json")
    if "/" not in run and (folder / "run.json").is_file():
        raise RecipeError(f"the run {run} is not finished and has no report", f"Look at it: dpo show {run}")
    if spec.startswith("models:/"):
        return registered_weights(spec, workspace)
    source = locate(ModelConfig(name=spec))
    if source.is_dir() and not (source / "adapter_config.json").exists():
        return source
    return _converted(spec, source, workspace)


_STAGES = {
    "SFT": ("prepare-sft", "import-model"),
    "DPO": ("train-dpo",),
    "PPO": ("train-ppo",),
    "Online DPO": ("train-online",),
    # One stage, of which a run has one.
    **dict.fromkeys(("GRPO", "Dr. GRPO", "DAPO", "GSPO", "RLOO"), ("train-grpo",)),
}


def _of_run(run: str, policy: str, report: Path) -> Path:
    try:
        facts = RunReport.model_validate_json(report.read_bytes())
    except ValidationError as error:
        raise RecipeError(
            f"the run {run} is no alignment run, or its report is damaged", "Name a model's folder"
        ) from error
    there = policies_of(facts)
    name = next((known for known in there if _plain(known) == _plain(policy)), None)
    if name is None:
        raise RecipeError(f"the run {run} has no policy {policy or '(empty)'}", f"It has: {', '.join(there)}")
    row = there[name]
    path = Path(str(row.uri).removeprefix("file://"))
    if not path.is_dir():
        raise RecipeError(f"the model of {run}:{name} is gone from {path}", "Run the recipe again")
    require_whole(path, row.sha256, f"the model of {run}:{name}")
    return path


def trained_rows(spec: str, workspace: Path) -> Path | None:
    """The table of rows that a run's policies were trained on; None of other models, or where it is gone."""
    report = workspace / "runs" / spec.partition(":")[0] / "report.json"
    if "/" in spec or not report.is_file():
        return None
    stages = {row.name: row for row in RunReport.model_validate_json(report.read_bytes()).stages}
    row = stages.get("validate-pairs") or stages.get("validate-unpaired")
    table = Path(str(row.uri).removeprefix("file://")) / "data.parquet" if row else None
    return table if table and table.is_file() else None


def policies_of(report: RunReport) -> dict[str, StageRow]:
    """The policies that a run made, as its tables call them, each with the stage that made its model."""
    stages = {row.name: row for row in report.stages if row.uri}
    measured = [row.name for row in report.evaluation.policies] if report.evaluation else []
    found: dict[str, StageRow] = {}
    for policy in dict.fromkeys(["SFT", "DPO", *measured]):
        # The champion is a model of another run.
        made = [] if policy == NAME else [stages[name] for name in _STAGES[policy] if name in stages]
        if made:
            found[policy] = made[0]
    return found


def _plain(policy: str) -> str:
    """A policy's name as people type it: online-dpo, dr_grpo."""
    return re.sub("[^a-z0-9]", "", policy.lower())


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
