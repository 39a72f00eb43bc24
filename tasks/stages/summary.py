"""The last task of a run: write its page and report, register the candidate, decide on its promotion.

It always runs, so that a fully cached run also gets its page.
"""

import json
import platform
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import JsonValue

from dpo_core.evaluation.policy_row import PolicyRow
from dpo_core.redaction import redact
from dpo_core.rewards.quality import RewardQuality
from dpo_core.system import write_atomic
from expectations.report import GateReport
from tasks.promotion.model_source import Champion
from tasks.provenance import hardware, source_tags
from tasks.recipe.recipe import Recipe
from tasks.reports.about import (
    RunData,
    describe_candidate,
    describe_policies,
    learned_from_reward,
    vocabulary_size,
)
from tasks.reports.alarms import REMOTE_CODE, alarms, promotion_alarms
from tasks.reports.data_notes import data_notes
from tasks.reports.document import Document
from tasks.reports.html import html
from tasks.reports.markdown import escaped, markdown
from tasks.reports.run_document import run_document
from tasks.reports.run_report import (
    Evaluation,
    EvaluationDetails,
    GateRow,
    ModelRow,
    PolicyTable,
    RunCost,
    RunInfo,
    RunReport,
    StageRow,
    TrainingDescription,
)
from tasks.reports.verdict import verdict
from tasks.runs.recipe import recipe_path, reproducing_command
from tasks.runs.record import StartTime
from tasks.stages.assess import assess, decide_promotion
from tasks.stages.base import Context, StageResult, run_task
from tasks.stages.data import GATES, LOAD, kind_of
from tasks.stages.evaluation import EVALUATE, load_answers, load_evaluation, with_data
from tasks.stages.models import IMPORT
from tasks.stages.prepare_sft import SFT
from tasks.stages.train_reward import REWARD
from tasks.stages.training import TrainedPolicy, label_notes
from tasks.store.facts import Facts, GateFacts, ImportFacts, LoadFacts, RewardFacts, facts_of, weights_sha256
from tasks.store.files import run_folder
from tasks.store.manifest import Manifest
from tasks.tracking.mlflow_run import metric_keys
from tasks.tracking.registry import register_model, version_with
from tasks.tracking.tracker import Tracker


@run_task("summary")
def summarise(
    context: Context,
    recipe: Recipe,
    stages: dict[str, StageResult],
    trained: list[TrainedPolicy],
    champion: Champion | None,
    started: StartTime,
    command: str,
) -> RunReport:
    """Write the run page and its Markdown, register the candidate, and return the report.

    Args:
        champion: the registered model that the candidate is compared with.
    """
    tracker = context.tracker
    manifests = {name: result.manifest for name, result in stages.items()}
    data = _run_data(manifests)
    policies = describe_policies(recipe)
    by_name = {policy.node.policy: policy.manifest for policy in trained}
    candidate = by_name[recipe.candidate_name]
    config = recipe.policies[recipe.candidate_name]
    about = describe_candidate(recipe, data, candidate, policies)
    base = manifests.get(SFT.name, data.base)
    outside = manifests.get(f"{IMPORT.name} {config.reference}", base)
    reference = by_name.get(config.reference, outside)
    model = _register(recipe, candidate, reference, data.read_by(config), tracker, about)
    info = run_info(context, recipe, started, command)
    evaluation = load_evaluation(manifests[EVALUATE.name])
    gate = [_gate_row(context.workspace, manifest) for manifest in data.gates]
    assessment = assess(recipe, manifests, evaluation)
    report = RunReport(
        run=info,
        stages=[stage_row(name, result) for name, result in stages.items()],
        gate=gate,
        evaluation=_evaluation(recipe, data, evaluation, load_answers(manifests[EVALUATE.name]).prompts),
        trained=about,
        candidate=recipe.candidate_name,
        policies=policies,
        reference_stage=SFT.name if SFT.name in manifests else IMPORT.name,
        fine_tuned=SFT.name in manifests,
        recipe_text=recipe_path(context.workspace, context.run_id).read_text(),
        win_rates=assessment.win_rates,
        suites=assessment.suites,
        comparisons=assessment.comparisons,
        reward_model=_reward_quality(manifests),
        curves={name: _curve(m) for name, m in manifests.items() if (m.path / "metrics.jsonl").exists()},
        cost=cost_of(stages, info.seconds),
        model=model,
        notes=({"description": recipe.description} if recipe.description else {})
        | label_notes(config, data.read_by(config))
        | data_notes(data, evaluation)
        | _remote_code(recipe, data.base),
    )
    concern = promotion_alarms(alarms(report), report)
    title = f"{model.name} version {model.version}"
    decision = decide_promotion(recipe, evaluation, report.comparisons, gate, concern, champion, title)
    report = report.model_copy(update={"decision": decision})
    page = publish(report, run_folder(context.workspace, context.run_id), tracker)
    context.prefect_artifacts.send_report(report.run.name, markdown(run_document(report)), page, "Run page")
    return report


def _run_data(manifests: Mapping[str, Manifest]) -> RunData:
    loaded = manifests[LOAD.name]
    kind = facts_of(loaded, LoadFacts).kind
    prompts = manifests[GATES[kind].name]
    rows = manifests[GATES["pairs"].name] if kind == "prompts" else prompts
    return RunData(loaded, manifests[IMPORT.name], prompts, rows, kind_of(rows))


def _remote_code(recipe: Recipe, base: Manifest) -> dict[str, JsonValue]:
    if not recipe.model.trust_remote_code:
        return {}
    code = facts_of(base, ImportFacts).remote_code_sha256
    return {REMOTE_CODE: f"Code that ships with the model was allowed to run (sha256 {code})."}


def run_info(context: Context, recipe: Recipe, started: StartTime, command: str) -> RunInfo:
    """Identity, times and environment of the run until now; `command` started this process."""
    seconds = started.seconds()
    return RunInfo(
        name=context.run_id,
        recipe=recipe.name,
        started_at=started.at,
        finished_at=started.at + timedelta(seconds=seconds),
        seconds=seconds,
        git_commit=source_tags().get("mlflow.source.git.commit"),
        command=reproducing_command(command, context.workspace, context.run_id),
        folder=str(Path.cwd()),
        started_by=command,
        mlflow_run_id=context.tracker.run_id,
        tracking_uri=redact(context.tracker.uri),
        python=platform.python_version(),
        platform=platform.platform(),
        hardware=hardware(),
    )


def publish(report: RunReport, folder: Path, tracker: Tracker) -> Path:
    """Write the report's files into the run's folder and record them in MLflow; returns the page's path."""
    page, text = folder / "page.html", folder / "summary.md"
    document = run_document(report)
    write_atomic(page, html(document))
    write_atomic(text, markdown(document))
    write_atomic(folder / "report.json", report.model_dump_json(indent=1))
    parent = tracker.parent
    for path in (page, text, folder / "report.json"):
        parent.artifact(path)
    parent.metrics(headline_metrics(report))
    parent.tag("dpo.verdict", verdict(report).headline)
    parent.tag("dpo.alarms", ", ".join(sorted({alarm.name for alarm in alarms(report)})) or "none")
    parent.tag("mlflow.note.content", _note(document, report, "the artifact `page.html` of this run."))
    for label, value in report.trained.lines if report.trained else []:
        parent.tag(f"dpo.{label.lower().replace(' ', '_')}", value)
    if report.model and report.model.version and not report.model.known:
        brief = _note(document, report, "the artifact `page.html` of the source run.")
        tracker.describe_version(report.model.name, report.model.version, brief)
    return page


def _note(document: Document, report: RunReport, page: str) -> str:
    """A short report for the description in MLflow. `page` is the address of the run page."""
    about = str(report.notes.get("description", ""))
    parts = [markdown(document, brief=True), *([escaped(about)] if about else [])]
    return "\n".join([*parts, f"Curves, samples and lineage: {page}\n"])


def headline_metrics(report: RunReport) -> dict[str, float]:
    """The numbers that compare runs, with the names that the evaluation uses: `gain/dpo`, and the candidate's
    gain as `gain`, the same name in every recipe."""
    metrics: dict[str, float] = {}
    rows = report.evaluation.policies if report.evaluation else []
    keys, shown = metric_keys(row.name for row in rows), PolicyRow.shown()
    for row in rows:
        values = {name: value for name, value in row.values().items() if shown[name].headline}
        metrics |= {f"{name}/{keys[row.name]}": value for name, value in values.items()}
        if row.name == report.candidate and "gain" in values:
            metrics["gain"] = values["gain"]
    for name in ("seconds", "tokens_trained", "flops", "peak_memory_bytes"):
        value = getattr(report.cost, name, None)
        if value is not None:
            metrics[f"cost/{name}"] = value
    return metrics


def _register(
    recipe: Recipe,
    model: Manifest,
    reference: Manifest,
    rows: Manifest,
    tracker: Tracker,
    about: TrainingDescription,
) -> ModelRow:
    """Register the candidate; weights that are registered already keep their version and aliases.

    Args:
        model: the candidate.
        reference: its reference.
        rows: its training rows.
    """
    name = recipe.registered_name
    known = version_with(tracker, name, model.sha256)
    if known is not None and known.run_id != tracker.run_id:
        version = str(known.version)
        return ModelRow(name=name, version=version, uri=model.uri, sha256=model.sha256, known=True)
    tags = {
        "dpo.policy": recipe.candidate_name,
        "dpo.objective": about.objective,
        "dpo.base_model": about.base_model,
        "dpo.data": about.data,
        "dpo.weights_sha256": weights_sha256(model),
        "dpo.artifact_sha256": model.sha256,
        "dpo.dataset_digest": rows.sha256,
        "dpo.ref_digest": weights_sha256(reference),
    }
    tags = {key: value for key, value in tags.items() if value}
    version = register_model(tracker, name, model.path, alias=recipe.registry.alias, tags=tags)
    return ModelRow(
        name=name, version=version, alias=recipe.registry.alias, uri=model.uri, sha256=model.sha256
    )


def stage_row(name: str, result: StageResult) -> StageRow:
    """A stage as a row of a report."""
    manifest = result.manifest
    return StageRow(
        name=name,
        state="cached" if result.cached else "ran",
        seconds=result.seconds,
        kind=manifest.kind,
        rows=manifest.rows,
        parameters=manifest.parameters,
        sha256=manifest.sha256,
        parents=list(manifest.parents),
        uri=manifest.uri,
        mlflow_run_id=result.mlflow_run_id,
    )


def _gate_row(workspace: Path, manifest: Manifest) -> GateRow:
    report = GateReport.model_validate_json((manifest.path / "gate.json").read_bytes())
    return GateRow(
        subject=report.subject,
        rows=report.rows,
        dropped=report.dropped,
        refused=report.refused,
        docs_uri=(Path(workspace) / report.docs_index).as_uri(),
        findings=report.findings,
    )


def _evaluation(
    recipe: Recipe, data: RunData, measured: EvaluationDetails, prompts: Sequence[str]
) -> Evaluation:
    answers = facts_of(data.rows, GateFacts)
    table = {name: getattr(measured, name) for name in PolicyTable.model_fields}
    shown = prompts[: len(measured.samples)]
    path = data.prompts.path / "data.parquet"
    # Not the whole table, of which a few rows are shown.
    schema = pq.read_schema(path)
    columns = {"prompt", "chosen", "completion", "label"} & set(schema.names)
    wanted = pc.field("prompt").isin(pa.array(shown, schema.field("prompt").type))
    rows = pd.read_parquet(path, columns=sorted(columns), filters=wanted)
    table["samples"] = with_data(measured.samples, shown, rows)
    return Evaluation(
        **table,
        learned_from=learned_from_reward(recipe, data),
        max_new_tokens=recipe.evaluate.sampling.max_new_tokens,
        chosen_tokens=answers.answer_tokens,
        chosen_ended=answers.answers_ended,
        vocabulary=vocabulary_size(data.base),
    )


def _reward_quality(manifests: Mapping[str, Manifest]) -> RewardQuality | None:
    manifest = manifests.get(REWARD.name)
    return None if manifest is None else facts_of(manifest, RewardFacts).quality


def _curve(manifest: Manifest) -> list[dict[str, float]]:
    lines = (manifest.path / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def cost_of(stages: Mapping[str, StageResult], seconds: float) -> RunCost:
    """The cost of the stages that ran; cached ones cost nothing."""
    ran = [facts_of(result.manifest, Facts) for result in stages.values() if not result.cached]
    return RunCost(
        seconds=seconds,
        seconds_by_stage={name: result.seconds for name, result in stages.items()},
        tokens_trained=int(sum(facts.tokens_trained or 0.0 for facts in ran)),
        flops=sum(facts.flops or 0.0 for facts in ran) or None,
        peak_memory_bytes=max((facts.peak_memory_bytes or 0 for facts in ran), default=0) or None,
    )
