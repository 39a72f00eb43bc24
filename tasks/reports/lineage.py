"""From the data to the registered model: what a reader wants before the list of all stages."""

from typing import NamedTuple

from tasks.reports.run_report import RunReport, StageRow


class Link(NamedTuple):
    """One box of the chain."""

    label: str
    name: str
    sha256: str = ""
    """Digest or id, empty where there is none."""


def chain(report: RunReport) -> list[Link]:
    """Dataset, reference, run and model version, each with its digest.

    Dataset and reference are the nearest ones behind the registered model; of a run that registered none, the
    last of their kind before the end. A policy of the run is no reference.
    """
    policies = {about.stage for about in report.policies.values()}
    behind = [stage for stage in _ancestors(report) if stage.name not in policies]
    dataset = _nearest(behind, "dataset")
    # The weights say which model the reference is; its cached log-probs stand in where no stage made a model.
    reference = _nearest(behind, "model") or _nearest(behind, "reference-logps")
    model = report.model
    version = f"{model.name}{f' version {model.version}' if model.version else ''}" if model else ""
    return [
        _made("Dataset", dataset),
        _made("Reference", reference),
        Link("Run", report.run.name, report.run.mlflow_run_id or ""),
        Link("Model version", version, model.sha256) if model else Link("Model version", "none registered"),
    ]


def _made(label: str, stage: StageRow | None) -> Link:
    return Link(label, stage.name, stage.sha256 or "") if stage else Link(label, "not recorded")


def _nearest(stages: list[StageRow], kind: str) -> StageRow | None:
    return next((stage for stage in stages if stage.kind == kind), None)


def _ancestors(report: RunReport) -> list[StageRow]:
    """The stages behind the registered model, nearest first, without the one that made it."""
    made: dict[str, StageRow] = {}
    for stage in report.stages:
        if stage.sha256:
            made.setdefault(stage.sha256, stage)
    if report.model is None or report.model.sha256 not in made:
        return [stage for stage in report.stages[::-1] if stage.sha256]
    found: list[StageRow] = []
    wave = [report.model.sha256]
    seen = set(wave)
    while wave:
        parents = [parent for digest in wave for parent in made[digest].parents if parent in made]
        wave = [parent for parent in dict.fromkeys(parents) if parent not in seen]
        seen.update(wave)
        found += [made[parent] for parent in wave]
    return found
