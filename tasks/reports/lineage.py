"""The lineage shown on the run page: the chain from the data to the registered model."""

from tasks.recipe.policies import REFERENCE
from tasks.reports.document import Link
from tasks.reports.run_report import RunReport, StageRow


def chain(report: RunReport) -> list[Link]:
    """Data set, the trained model that the run starts from, reference, the candidate's ancestors, run and
    model version.

    The data set is the registered model's nearest ancestor of that kind; if no model was registered, the
    run's last data set.
    """
    ancestors = _ancestors(report)
    reference = report.models.get(REFERENCE)
    # The reference is a model; if no stage made one, show its cached log-probs instead.
    reference = reference or _nearest(ancestors, "model") or _nearest(ancestors, "reference-logps")
    model = report.model
    version = f"{model.name}{f' version {model.version}' if model.version else ''}" if model else ""
    origin = report.trained.started_from if report.trained else None
    return [
        _stage_link(report, "Dataset", _nearest(ancestors, "dataset")),
        *([Link("Started from", origin.sentence, origin.sha256)] if origin else []),
        _stage_link(report, "Reference", reference),
        *(_ancestor_link(report, name) for name in report.lineage(report.candidate)),
        Link("Run", report.run.name, report.run.mlflow_run_id or ""),
        Link("Model version", version, model.sha256) if model else Link("Model version", "none registered"),
    ]


def _ancestor_link(report: RunReport, name: str) -> Link:
    """A policy, or a model from outside the recipe, which the stage with its name imported."""
    followers = [report.candidate, *report.lineage(report.candidate)]
    starts = any(report.policies[other].start == name for other in followers if other in report.policies)
    row = report.models.get(name) or next((r for r in report.stages if r.name.endswith(f" {name}")), None)
    label = "Start" if starts else "KL reference"
    return Link(label, report.label(name), (row.sha256 if row else None) or "")


def _stage_link(report: RunReport, label: str, stage: StageRow | None) -> Link:
    if stage is None:
        return Link(label, "not recorded")
    return Link(label, report.stage_label(stage.name), stage.sha256 or "")


def _nearest(stages: list[StageRow], kind: str) -> StageRow | None:
    return next((stage for stage in stages if stage.kind == kind), None)


def _ancestors(report: RunReport) -> list[StageRow]:
    """The stages of the registered model's ancestors, nearest first."""
    by_digest = {stage.sha256: stage for stage in reversed(report.stages) if stage.sha256}
    if report.model is None or report.model.sha256 not in by_digest:
        trained = {about.stage for about in report.policies.values()}
        return [stage for stage in report.stages[::-1] if stage.sha256 and stage.name not in trained]
    digests = [report.model.sha256]
    for digest in digests:  # grows while it is read
        digests += [p for p in by_digest[digest].parents if p in by_digest and p not in digests]
    return [by_digest[digest] for digest in digests[1:]]
