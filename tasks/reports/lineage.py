"""The lineage shown on the run page: the chain from the data to the registered model."""

from typing import NamedTuple

from tasks.recipe.policies import REFERENCE
from tasks.reports.run_report import PolicyAbout, RunReport, StageRow


class Link(NamedTuple):
    """One box of the chain."""

    label: str
    name: str
    sha256: str = ""
    """Digest or id; empty if there is none."""


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
        _stage_link("Dataset", _nearest(ancestors, "dataset")),
        *([Link("Started from", origin.sentence, origin.sha256)] if origin else []),
        _stage_link("Reference", reference),
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


class PolicyLine(NamedTuple):
    """A row of the table of trained policies."""

    name: str
    about: PolicyAbout
    sha256: str


def policy_lines(report: RunReport) -> list[PolicyLine]:
    """All trained policies, in the recipe's order."""
    models = report.models
    return [
        PolicyLine(report.label(name), about, (models[name].sha256 if name in models else None) or "")
        for name, about in report.policies.items()
    ]


def _stage_link(label: str, stage: StageRow | None) -> Link:
    return Link(label, stage.name, stage.sha256 or "") if stage else Link(label, "not recorded")


def _nearest(stages: list[StageRow], kind: str) -> StageRow | None:
    return next((stage for stage in stages if stage.kind == kind), None)


def _ancestors(report: RunReport) -> list[StageRow]:
    """The stages of the registered model's ancestors, nearest first."""
    by_digest: dict[str, StageRow] = {}
    for stage in report.stages:
        if stage.sha256:
            by_digest.setdefault(stage.sha256, stage)
    if report.model is None or report.model.sha256 not in by_digest:
        trained = {about.stage for about in report.policies.values()}
        return [stage for stage in report.stages[::-1] if stage.sha256 and stage.name not in trained]
    ancestors: list[StageRow] = []
    level = [report.model.sha256]
    seen = set(level)
    while level:
        parents = [parent for digest in level for parent in by_digest[digest].parents if parent in by_digest]
        level = [parent for parent in dict.fromkeys(parents) if parent not in seen]
        seen.update(level)
        ancestors += [by_digest[parent] for parent in level]
    return ancestors
