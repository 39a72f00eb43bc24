"""The alignment flow: data gate, reference, pairs, cached log-probs, DPO, PPO baseline, evaluation, page."""

import contextlib
import logging
from datetime import UTC, datetime
from pathlib import Path

from prefect import flow

from dpo_core.dpo import DpoConfig
from dpo_core.errors import DpoError, GateRefused, RecipeError
from dpo_core.reward_training import no_agreement
from tasks.ahead import check_ahead
from tasks.data import load_data, sample_pairs, validate
from tasks.evaluation import evaluate
from tasks.manifest import Manifest
from tasks.models import CACHE, CACHE_GUIDE, cache_reference, import_model
from tasks.recipe import Recipe
from tasks.report import RunReport
from tasks.runs import RunRecord, find_run, new_run, save_run
from tasks.stage import Context, Stage, StageResult, remember_tracker
from tasks.store import Store
from tasks.summary import command_line, summarise
from tasks.tracking import Tracker
from tasks.training import GUIDE, prepare_sft, train_dpo, train_ppo, train_reward
from tasks.workspace import disk_errors, open_workspace

log = logging.getLogger("dpo")


@flow(name="dpo-alignment", flow_run_name="{recipe.name}", log_prints=False, persist_result=False)
def alignment(recipe: Recipe, resume: str | None = None) -> RunReport:
    """Align a model as the recipe says.

    Args:
        recipe: decides everything about the run.
        resume: name of an earlier run to go on with, or `latest`; its MLflow run is continued.

    Raises:
        GateRefused: the data gate refused; nothing after it ran.
        DpoError: a stage failed; the message says what to do.
    """
    check_ahead(recipe, resume)
    workspace = open_workspace(recipe.workspace)
    command = command_line()
    record = find_run(workspace, resume, recipe.name) if resume else new_run(workspace, recipe.name, command)
    tracker = Tracker(recipe.tracking, workspace)
    mlflow_id = tracker.start_parent(
        record.run_id,
        recipe=recipe.model_dump(mode="json"),
        run_id=record.mlflow_run_id,
        description=recipe.description,
        tags={"dpo.run": record.run_id, "dpo.command": command},
    )
    record = record.model_copy(update={"mlflow_run_id": mlflow_id, "status": "running", "error": None})
    save_run(workspace, record)
    context = Context(workspace=str(workspace), run_id=record.run_id, mlflow_run_id=mlflow_id)
    remember_tracker(context, tracker)
    try:
        Store(workspace).sweep()
        report = run_stages(context, recipe, command)
    except BaseException as error:
        _ended_badly(workspace, record, tracker, error)
        raise
    tracker.finish_parent("FINISHED")
    save_run(workspace, record.model_copy(update={"status": "done"}))
    return report


def _ended_badly(workspace: Path, record: RunRecord, tracker: Tracker, error: BaseException) -> None:
    status = "refused" if isinstance(error, GateRefused) else "failed"
    reason = str(error) if isinstance(error, DpoError) else f"{type(error).__name__}: {error}"
    with contextlib.suppress(DpoError):  # a full disk must not hide why the run ended
        save_run(workspace, record.model_copy(update={"status": status, "error": reason}))
    tracker.parent.tag("dpo.error", reason)
    tracker.finish_parent("FAILED" if isinstance(error, Exception) else "KILLED")


def run_stages(context: Context, recipe: Recipe, command: str) -> RunReport:
    """All stages, then the run page."""
    started = datetime.now(UTC)
    stages: dict[str, StageResult] = {}
    compose(context, recipe, stages)
    with disk_errors(Path(context.workspace), "writing the run page"):
        return summarise(context, recipe, stages, started, command)


def compose(context: Context, recipe: Recipe, stages: dict[str, StageResult]) -> None:
    """The stages in their order; each hands a manifest to the next. What each came to goes into `stages`."""

    def keep(name: str, result: StageResult) -> Manifest:
        stages[name] = result
        return result.manifest

    seed, tokens = recipe.seed, recipe.tokens
    loaded = keep("load-data", load_data(context, recipe.data))
    kind = str(loaded.extra["kind"])
    _require_labels(recipe, kind)
    base = keep("import-model", import_model(context, recipe.model, tokens.max_length))
    judged = keep(f"validate-{kind}", validate(context, kind, loaded, base, recipe.gate, tokens))
    _require_answers(recipe, judged)

    reference = base
    if recipe.sft.enabled:
        given = None if kind == "prompts" else judged
        reference = keep("prepare-sft", prepare_sft(context, base, given, recipe.sft, tokens, seed))

    pairs, reward_model = judged, None
    if kind == "prompts":
        sampled = sample_pairs(
            context, judged, reference, recipe.pairs, tokens, str(recipe.reward.source), seed
        )
        pairs = keep(
            "validate-pairs",
            validate(context, "pairs", keep("sample-pairs", sampled), base, recipe.gate, tokens),
        )

    def logps_of(model: Manifest, config: DpoConfig, stage: Stage) -> Manifest:
        engine, budget = config.engine, recipe.cache.token_budget
        cached = cache_reference(
            context,
            model,
            pairs,
            tokens,
            engine.precision,
            budget,
            engine.processes,
            engine.threads,
            stage,
            config,
        )
        return keep(stage.name, cached)

    guide, cache = reference, CACHE
    if recipe.guide is not None:
        logps = logps_of(reference, recipe.guide, CACHE)
        first = train_dpo(context, reference, reference, pairs, logps, recipe.guide, tokens, seed, GUIDE)
        guide, cache = keep("train-guide", first), CACHE_GUIDE
    logps = logps_of(guide, recipe.dpo, cache)
    trained = train_dpo(context, reference, guide, pairs, logps, recipe.dpo, tokens, seed)
    policy = keep("train-dpo", trained)
    policies = {"SFT": reference, "DPO": policy}
    source = recipe.reward.source
    if recipe.reward.learned:
        settings = recipe.reward.model
        reward_model = keep("train-reward", train_reward(context, reference, pairs, settings, tokens, seed))
    if recipe.ppo.enabled:
        known, gold = (None, source) if reward_model else (source, None)
        sampling = recipe.evaluate.sampling
        ppo = train_ppo(
            context, reference, judged, reward_model, known, recipe.ppo, sampling, tokens, seed, gold
        )
        policies["PPO"] = keep("train-ppo", ppo)
    # A known reward measures also where PPO learned from the model: that is what shows over-optimisation.
    proxy = reward_model if source is None else None
    keep("evaluate", evaluate(context, policies, judged, pairs, proxy, source, recipe.evaluate, tokens, seed))


def _require_answers(recipe: Recipe, judged: Manifest) -> None:
    """What would be missed only after the training: an interval needs two answers, SFT a desirable one."""
    if judged.extra.get("held_out_prompts") == recipe.evaluate.samples_per_prompt == 1:
        raise RecipeError(
            "one held-out prompt and one sample of it give no interval to compare the policies by",
            "Set evaluate.samples_per_prompt to 2 or more, or hold out more prompts",
        )
    if recipe.reward.margin_by_agreement and judged.extra.get("with_agreement") == 0:
        raise no_agreement()
    if judged.extra.get("desirable") == 0 and _sft_reads_answers(recipe):
        raise RecipeError(
            "no training row is labelled desirable, and SFT learns from the desirable answers",
            "Set sft.demonstrations or sft.enabled=false",
        )


def _sft_reads_answers(recipe: Recipe) -> bool:
    sft = recipe.sft
    return sft.enabled and sft.demonstrations is None and sft.made_demonstrations is None


def _require_labels(recipe: Recipe, kind: str) -> None:
    """What only the data can tell: whether they are of the kind that the recipe learns from.

    Prompts alone need a reward to label samples, and demonstrations; unpaired rows need an objective of their
    own, and a reward, because a reward model is trained on pairs.
    """
    if kind == "unpaired":
        for name, config in (("guide", recipe.guide), ("dpo", recipe.dpo)):
            if config is not None and not config.unpaired:
                raise RecipeError(
                    f"the data are unpaired rows, and objective '{config.objective}' learns from pairs",
                    f"Set {name}.objective to kto or bco, or give rows with a chosen and a rejected answer",
                )
        if recipe.reward.source is None:
            raise RecipeError(
                "the data are unpaired rows, and without reward.source a reward model would be trained on "
                "pairs",
                "Set reward.source",
            )
        if recipe.reward.learned:
            raise RecipeError(
                "the data are unpaired rows, and the reward model of reward.optimise is trained on pairs",
                "Set reward.optimise to source",
            )
    if kind != "prompts":
        return
    if recipe.reward.source is None:
        raise RecipeError(
            "the data are prompts without pairs, and no reward labels samples", "Set reward.source"
        )
    if recipe.reward.margin_by_agreement:  # nobody votes on sampled pairs
        raise no_agreement()
    if _sft_reads_answers(recipe):
        raise RecipeError(
            "the data have no chosen answers for SFT to learn from",
            "Set sft.demonstrations or sft.enabled=false",
        )
