"""From the data to the registered model: what a reader wants before the list of all stages."""

from typing import NamedTuple

from tasks.recipe.policies import REFERENCE
from tasks.reports.run_report import PolicyAbout, RunReport, StageRow


class Link(NamedTuple):
    """One box of the chain."""

    label: str
    name: str
    sha256: str = ""
    """Digest or id, empty where there is none."""


def chain(report: RunReport) -> list[Link]:
    """Dataset, the trained model that the run starts from, reference, the models that the candidate starts
    from or is held to, run and model version.

    The dataset is the nearest one behind the registered model; of a run that registered none, the last one.
    """
    behind = _ancestors(report)
    reference = report.models.get(REFERENCE)
    # The weights say which model the reference is; its cached log-probs stand in where no stage made a model.
    reference = reference or _nearest(behind, "model") or _nearest(behind, "reference-logps")
    model = report.model
    version = f"{model.name}{f' version {model.version}' if model.version else ''}" if model else ""
    origin = report.trained.started_from if report.trained else None
    return [
        _made("Dataset", _nearest(behind, "dataset")),
        *([Link("Started from", origin.sentence, origin.sha256)] if origin else []),
        _made("Reference", reference),
        *(_behind(report, name) for name in report.lineage(report.candidate)),
        Link("Run", report.run.name, report.run.mlflow_run_id or ""),
        Link("Model version", version, model.sha256) if model else Link("Model version", "none registered"),
    ]


def _behind(report: RunReport, name: str) -> Link:
    """A policy, or a model from outside the recipe, which a stage of its name fetched."""
    followers = [report.candidate, *report.lineage(report.candidate)]
    starts = any(report.policies[one].start == name for one in followers if one in report.policies)
    row = report.models.get(name) or next((r for r in report.stages if r.name.endswith(f" {name}")), None)
    label = "Start" if starts else "Held to"
    return Link(label, report.label(name), (row.sha256 if row else None) or "")


class PolicyLine(NamedTuple):
    """A policy in the table of what was trained."""

    name: str
    about: PolicyAbout
    sha256: str


def policy_lines(report: RunReport) -> list[PolicyLine]:
    """Every policy that was trained, in the order of the recipe."""
    made = report.models
    return [
        PolicyLine(report.label(name), about, (made[name].sha256 if name in made else None) or "")
        for name, about in report.policies.items()
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
        trained = {about.stage for about in report.policies.values()}
        return [stage for stage in report.stages[::-1] if stage.sha256 and stage.name not in trained]
    found: list[StageRow] = []
    wave = [report.model.sha256]
    seen = set(wave)
    while wave:
        parents = [parent for digest in wave for parent in made[digest].parents if parent in made]
        wave = [parent for parent in dict.fromkeys(parents) if parent not in seen]
        seen.update(wave)
        found += [made[parent] for parent in wave]
    return found
