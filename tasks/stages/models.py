"""Model stages without training: import a model, and cache the log-probs of a reference."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo_core.data.tokens.config import TokenConfig
from dpo_core.errors import ModelError
from dpo_core.estimates import estimate
from dpo_core.jobs.files import CHECK_VERSION, ImportJob, InferenceConfig, ReferenceJob
from dpo_core.models.config import NEW_DENOISER, ModelConfig
from dpo_core.models.folder import code_digest
from dpo_core.models.remote_code import trust
from dpo_core.models.source import (
    check_source_context,
    locate,
    parameter_count,
    read_template,
    source_digest,
    weights_digest,
)
from dpo_core.reference.cache import DEFINITION_VERSION
from dpo_core.scoring.precision import Precision
from dpo_core.training.config import EngineConfig
from tasks.promotion.model_source import as_folder
from tasks.recipe.policies import REFERENCE, PolicyFields
from tasks.recipe.study import PlannedPolicy
from tasks.runs.record import read_run
from tasks.stages.base import Context, Output, RunningStage, Stage, StageResult, run_stage, stage_task
from tasks.stages.data import kind_of
from tasks.stages.job import common_fields, run_model_job
from tasks.stages.planned_run import PlannedRun
from tasks.stages.training_job import write_split
from tasks.store.facts import ImportFacts, LogpsFacts, Origin, OriginFacts, weights_sha256, with_facts
from tasks.store.files import CACHE_FOLDER
from tasks.store.manifest import Manifest

log = logging.getLogger(__name__)
IMPORT = Stage("import-model", 2, "model", ImportFacts, overhead=5.0, job="one rank")


def _estimate(run: PlannedRun, label: str) -> estimate.EstimatedWork:
    """Reading the training examples of the first policy that uses this cache."""
    labels = cache_labels(list(run.nodes.values()))
    policy = next(run.nodes[node].config for node, cache in labels.items() if cache == label)
    examples = run.examples(policy.entry.data)
    tokens, flops = estimate.read(run.shape, examples)
    times = 1 + bool(getattr(policy.settings, "reads_mismatched", False))
    precision = policy.settings.engine.precision
    return estimate.EstimatedWork(
        times * tokens,
        times * flops,
        precision,
        processes=policy.settings.engine.processes,
        note=examples.note,
    )


CACHE = Stage("cache-reference", 1, "reference-logps", LogpsFacts, _estimate, overhead=4.0, job="shared")


@stage_task(IMPORT.name)
def import_model(context: Context, config: ModelConfig, max_length: int, precision: Precision) -> StageResult:
    """Import a model as a checkpoint folder, and check that it can be trained, packed or padded.

    Args:
        max_length: tokens of the longest training rows.
        precision: of the training.
    """
    config, origin = _resolve(context, config)
    source = None if config.denoiser else locate(config)
    if source is not None:
        check_source_context(source, max_length)

    def compute(running: RunningStage) -> Output:
        out = running.empty_folder("out")
        job = ImportJob(
            **common_fields(running), model=config, out=str(out), longest=max_length, precision=precision
        )
        check = run_model_job(running, job)
        log.info("%s: %s", check["layout"], check["reason"])
        running.mlflow.tag("dpo.layout", f"{check['layout']}: {check['reason']}")
        facts = ImportFacts(weights_sha256=weights_digest(out), **check)
        if origin is not None:
            facts = facts.model_copy(update={"started_from": origin})
        if config.trust_remote_code:
            running.mlflow.tag("dpo.trust_remote_code", "true")
            code = key_settings.get("code", "no Python file")
            facts = facts.model_copy(update={"remote_code_sha256": code})
        return Output(out, parameters=parameter_count(out), facts=facts)

    key_settings = _import_settings(config, source)
    if origin is not None:
        del key_settings["name"]  # the same weights of another version or run are the same model
    key_settings["check"] = {"version": CHECK_VERSION, "longest": max_length, "precision": precision}
    result = run_stage(context, IMPORT, {}, key_settings, compute)
    if config.trust_remote_code and not context.plan:
        # On the whole run, even if an earlier run imported the model.
        context.tracker.parent.tag("dpo.trust_remote_code", "true")
    if not result.manifest.planned:
        if config.trust_remote_code:
            trust(result.manifest.path)  # for all later jobs of this run
        check_source_context(result.manifest.path, max_length)  # the token budget is no part of its key
    if origin is None:
        return result
    # The origin in this run, even if an earlier run imported the same weights by another name.
    manifest = with_facts(result.manifest, OriginFacts(started_from=origin))
    return result.model_copy(update={"manifest": manifest})


def _resolve(context: Context, config: ModelConfig) -> tuple[ModelConfig, Origin | None]:
    """Like `as_folder`; the origin also shows the alias that the recipe names, if it names one."""
    folder, origin = as_folder(config, context.workspace, context.tracker, verify=True)
    record = None if context.plan or origin is None else read_run(context.workspace, context.run_id)
    for alias, pinned in record.models.items() if record else ():
        if origin and pinned == origin.name == config.name and "@" in alias:
            origin = origin.model_copy(update={"title": f"{origin.title} ({alias.partition('@')[2]})"})
    return folder, origin


def _import_settings(config: ModelConfig, source: Path | None) -> dict[str, Any]:
    """Everything that decides the model: contents and digests as well as paths, so that a model or
    template overwritten in place does not match the cache. `source` is None for a new diffusion model."""
    if config.denoiser is not None or source is None:
        return {**config.model_dump(mode="json", include={"denoiser"}), "definition": NEW_DENOISER}
    settings = {**config.model_dump(mode="json"), "source": _source_digest(source)}
    code = code_digest(source) if config.trust_remote_code else None
    if code is not None:
        settings["code"] = code
    if config.scratch is None:
        # As in keys from before this field existed, so that stored models still match.
        del settings["scratch"]
    if config.chat_template:
        settings["chat_template"] = read_template(config.chat_template)
    return settings


def _source_digest(source: Path) -> str:
    try:
        return source_digest(source)
    except OSError as error:
        raise ModelError(
            f"the model file {error.filename} cannot be read ({error.strerror})", "Check its permissions"
        ) from error


@stage_task(CACHE.name, f"{CACHE.name}{{context.label}}")
def cache_reference(
    context: Context,
    reference: Manifest,
    rows: Manifest,
    policy: PolicyFields,
    tokens: TokenConfig,
    token_budget: int,
    seed: int,
) -> StageResult:
    """Log-probs of a policy's training rows under its reference; only those not yet cached are computed.

    Args:
        rows: pairs, or unpaired rows.
        policy: the policy to train, which decides the log-probs that are needed.
        seed: of that training; it chooses the rows if the policy has a limit.
    """
    settings = policy.settings
    engine = settings.engine

    def compute(running: RunningStage) -> Output:
        limit = _logps_settings(policy, seed).get("limit")
        training = running.scratch / "train.parquet"
        count = write_split(rows, "train", training, limit=limit, seed=seed)
        out = running.empty_folder("out")
        weights = weights_sha256(reference)
        job = ReferenceJob(
            **common_fields(running) | {"ranks": _ranks_of(engine, context.ranks)},
            model=str(reference.path),
            weights_sha256=weights,
            described=f"{reference.stage} of {context.run_id}, {reference.parameters or 0:,} parameters",
            rows=str(training),
            method=policy.method,
            settings=settings.model_dump(mode="json"),
            tokens=tokens,
            caches=str(context.workspace / CACHE_FOLDER),
            out=str(out / "shard"),
            token_budget=token_budget,
        )
        result = run_model_job(running, job, total=2 * count, unit="sequences")
        dropped = result.pop("dropped")
        facts = LogpsFacts(
            reference_weights=weights,
            precision=engine.precision,
            from_cache=result["sequences"] - result["computed"],
            **result,
            **{f"dropped_{reason}": number for reason, number in dropped.items()},
        )
        metrics = {"cache/computed": float(facts.computed), "cache/found": float(facts.from_cache)}
        metrics["cost/flops"] = facts.flops or 0.0
        metrics |= {f"data/{reason}": float(number) for reason, number in dropped.items()}
        return Output(out, rows=count - sum(dropped.values()), facts=facts, metrics=metrics)

    key_settings: dict[str, Any] = {
        "tokens": tokens.model_dump(mode="json"),
        "definition": DEFINITION_VERSION,
    }
    key_settings |= _logps_settings(policy, seed)
    if not reference.planned:
        weights_sha256(reference)  # raises if it is missing, before the job starts
    return run_stage(context, CACHE, {"reference": reference, kind_of(rows): rows}, key_settings, compute)


def _ranks_of(engine: EngineConfig, ranks: InferenceConfig) -> InferenceConfig:
    """The ranks of the training that will read the log-probs."""
    return ranks.model_copy(update={"processes": engine.processes, "threads": engine.threads})


def _logps_settings(policy: PolicyFields, seed: int) -> dict[str, Any]:
    """Everything apart from reference, rows and tokens that decides the log-probs of a policy's training.

    Token budget, processes and threads change the time and not the values.
    """
    settings = policy.settings
    needed: dict[str, Any] = {"precision": settings.engine.precision}
    if policy.entry.data == "unpaired":
        needed["objective"] = settings.objective  # KTO needs more than BCO
        if settings.limit is not None:  # KTO's mismatched pairs depend on all rows
            needed |= {"limit": settings.limit, "seed": seed}
    return needed


def cache_labels(nodes: Sequence[PlannedPolicy]) -> dict[str, str]:
    """Map the label of each node that reads cached log-probs to the label of the stage that computes them.

    Nodes that need the same log-probs share a stage. Its label names a reference other than the prepared one,
    and the node if an earlier node needs other log-probs of the same reference.
    """
    labels: dict[str, str] = {}
    first: dict[str, tuple[PolicyFields, int]] = {}
    for node in nodes:
        policy = node.config
        if policy.entry.reference(policy.settings) != "cached":
            continue
        label = "" if policy.reference == REFERENCE else f" {policy.reference}"
        if node.point is not None and (policy.reference, node.seed) in node.needs:
            label += f" seed {node.seed}"
        other = first.setdefault(label, (policy, node.seed))
        labels[node.label] = (
            label
            if _logps_settings(*other) == _logps_settings(policy, node.seed)
            else f"{label} for{node.label}"
        )
    return labels
