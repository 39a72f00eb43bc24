"""The frame of every stage: reuse its artifact from the store, or compute it under a lock and record it.

A stage is a function from manifests and its part of the recipe to files. It uses neither Prefect nor MLflow;
`run_stage` adds both.
"""

import logging
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec, TypeVar

from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from deploy.launchers import Cluster, Launcher, launcher_of
from deploy.launchers.job_server_client import JobServer
from dpo_core.config import Config
from dpo_core.errors import DpoError, without_secrets
from dpo_core.jobs.files import InferenceConfig
from dpo_core.system import digest_json
from tasks.runs.references import record_lookup
from tasks.signals import Stop
from tasks.stages.prefect_artifacts import PrefectArtifacts, artifact_key
from tasks.stages.progress import Progress
from tasks.store.facts import Facts, scalar_facts
from tasks.store.files import disk_fault
from tasks.store.manifest import PLANNED, Manifest, stage_key
from tasks.store.store import ArtifactInfo, Store
from tasks.tracking.mlflow_run import StageRun, flatten
from tasks.tracking.tracker import Tracker

if TYPE_CHECKING:
    from dpo_core.estimates import estimate
    from tasks.stages.planned_run import PlannedRun

    Estimate = Callable[[PlannedRun, str], estimate.EstimatedWork]
    Settings = Callable[[PlannedRun, str], tuple[str, Any]]

log = logging.getLogger("dpo")


@dataclass(frozen=True)
class Stage:
    """What identifies and describes a stage. Raising the version makes it run again everywhere."""

    name: str
    version: int
    kind: str
    """Kind of its artifact."""
    facts: type[Facts]
    """Class of the facts that it records with its artifact."""
    estimate: "Estimate | None" = None
    """Estimates the stage's computation before a run, by its label; None: it runs no model."""
    overhead: float = 2.0
    """Seconds that it takes at any size: starting processes, loading a model, writing artifacts."""
    settings: "Settings | None" = None
    """For a training, by its label: the settings' place in the recipe (`reward.model`), and the settings."""
    job: Literal["none", "one rank", "shared"] = "none"
    """Where a stage without training computes: none, in the flow's process; one rank, in a job of a single
    rank without a GPU; shared, in a job on the ranks of the recipe's `inference`."""
    subject: str = ""
    """For a data gate: the kind of rows that it checks. Its artifact is logged as an input of the run."""


@dataclass
class Output:
    """What a stage computed."""

    files: Path | Mapping[str, Path]
    rows: int | None = None
    parameters: int | None = None
    facts: Facts = field(default_factory=Facts)
    metrics: dict[str, float] = field(default_factory=dict)


# Why a stage would run: it never ran here; its settings or code differ from earlier runs; its inputs differ
# or do not exist yet; its stored artifact is damaged.
Why = Literal["new", "changed", "data", "damaged"]


class StageResult(Config):
    """Result of a stage: the manifest of its artifact, and whether an earlier run computed it."""

    name: str
    """The stage's name, with its label."""
    manifest: Manifest
    cached: bool
    """Whether the artifact was in the store."""
    seconds: float
    """Time of this stage in this run."""
    mlflow_run_id: str | None = None
    """The stage's child run in MLflow; None if cached."""
    why: Why | None = None
    """In a plan: why the stage would run."""


@dataclass(frozen=True)
class Context:
    """The run that a task belongs to: its name, its store, its tracker and its settings.

    It holds live objects, because all tasks of a run execute in the process of its flow. Prefect searches the
    parameters of a task, and their fields, for futures; it neither looks into these objects nor copies them.
    """

    run_id: str
    """Name of the run."""
    store: Store
    """The workspace's artifacts."""
    tracker: Tracker
    """The run in MLflow; not opened in a plan."""
    stop: Stop
    """Whether the run is being stopped."""
    cluster: Cluster | None = None
    """Where jobs run; None: on this machine."""
    ranks: InferenceConfig = field(default_factory=InferenceConfig)
    """Ranks of the jobs that sample, score or evaluate."""
    server: JobServer = field(default_factory=JobServer)
    """Starts jobs of one process on this machine; the creator of the context closes it."""
    prefect_artifacts: PrefectArtifacts = field(default_factory=PrefectArtifacts)
    label: str = ""
    """Distinguishes this stage from others of its name in the run: " DPO beta=0.1 seed 0"."""
    plan: bool = False
    """Only look into the store. A stage that would have to run returns a `planned` manifest."""

    @property
    def workspace(self) -> Path:
        """The workspace, absolute."""
        return self.store.workspace

    def launcher(self, job: str, *, one_rank: bool = False) -> Launcher:
        """The launcher for a job of this name.

        Args:
            one_rank: a single rank without a GPU does the job.
        """
        cluster = self.cluster.for_one_rank() if self.cluster and one_rank else self.cluster
        return launcher_of(cluster, job, self.stop.no_time_to_save, self.server)

    def labelled(self, label: str) -> "Context":
        """The same run, for stages with this label."""
        return replace(self, label=label)


@dataclass
class RunningStage:
    """A stage while it computes: its folders, its MLflow run and its progress bars."""

    stage: Stage
    context: Context
    scratch: Path
    """Survives a kill: the folder for checkpoints and partial results."""
    mlflow: StageRun
    _bars: list[Progress] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The stage's name, with its label."""
        return self.stage.name + self.context.label

    def progress(self, total: int, unit: str = "steps") -> Progress:
        """Start a progress bar over `total` units, whose plural is `unit`."""
        bar = Progress(self.name, total, self.context.stop, self.context.prefect_artifacts, unit)
        self._bars.append(bar)
        return bar

    def empty_folder(self, name: str) -> Path:
        """An empty folder of that name in the scratch folder."""
        folder = self.scratch / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder


P = ParamSpec("P")
Q = ParamSpec("Q")
R = TypeVar("R")
StageFunction = Callable[Concatenate[Context, P], StageResult]


def run_task(name: str, task_run_name: str | None = None) -> Callable[[Callable[Q, R]], Callable[Q, R]]:
    """Make a function a Prefect task that stores no result, and whose errors contain no secret."""

    def wrap(function: Callable[Q, R]) -> Callable[Q, R]:
        return task(
            name=name,
            task_run_name=task_run_name or name,
            # The store decides what is cached; Prefect's own caching would not check the files.
            cache_policy=NO_CACHE,
            persist_result=False,
            log_prints=False,
        )(without_secrets()(function))

    return wrap


def stage_task(name: str, task_run_name: str | None = None) -> Callable[[StageFunction[P]], StageFunction[P]]:
    """Make a stage a Prefect task; in a plan call the plain function, which needs no server."""

    def wrap(function: StageFunction[P]) -> StageFunction[P]:
        tracked = run_task(name, task_run_name)(function)

        @wraps(function)
        def call(context: Context, *args: P.args, **kwargs: P.kwargs) -> StageResult:
            return (function if context.plan else tracked)(context, *args, **kwargs)

        return call

    return wrap


def run_stage(
    context: Context,
    stage: Stage,
    inputs: Mapping[str, Manifest],
    config: Any,
    compute: Callable[[RunningStage], Output],
    *,
    planned_facts: Callable[[], Facts] | None = None,
) -> StageResult:
    """Return the stage's artifact: from the store if it is there and intact, else by computing it.

    Args:
        inputs: the artifacts that the stage reads, by role; their digests are part of the key.
        config: everything else that decides the result (models, numbers, strings).
        planned_facts: facts of the artifact that a plan can state before it is computed.
    """
    start = time.monotonic()
    name = stage.name + context.label
    store, tracker = context.store, context.tracker
    digest = digest_json(config)
    key = stage_key(stage.name, stage.version, digest, {role: m.sha256 for role, m in inputs.items()})
    if context.plan:
        return _plan_stage(context, stage, key, digest, inputs, planned_facts)
    record_lookup(store, context.run_id, stage.name, key, [m.sha256 for m in inputs.values()])
    manifest = store.lookup(stage.name, key)
    child: StageRun | None = None
    if manifest is None:
        with store.lock(stage.name, key):
            manifest = store.lookup(stage.name, key)
            if manifest is None:
                tags = {"dpo.config_digest": digest, "dpo.run": context.run_id}
                with tracker.child(name, tags=tags) as child:
                    child.params(_as_params(config))
                    manifest = _compute(context, stage, key, digest, inputs, compute, child)
    if child is None:
        context.tracker.close_stage(name, manifest, _as_params(config))
    if stage.subject:
        context.tracker.parent.dataset(
            stage.subject, manifest.sha256, manifest.rows, manifest.uri, "training"
        )
    result = StageResult(
        name=name,
        manifest=manifest,
        cached=child is None,
        seconds=time.monotonic() - start,
        mlflow_run_id=child.run_id if child else None,
    )
    _announce(context, name, result)
    return result


def _plan_stage(
    context: Context,
    stage: Stage,
    key: str,
    digest: str,
    inputs: Mapping[str, Manifest],
    planned_facts: Callable[[], Facts] | None,
) -> StageResult:
    """What `run_stage` would return, without writing to the disk."""
    name, store = stage.name + context.label, context.store
    planned = any(manifest.planned for manifest in inputs.values())
    cached = None if planned else store.peek(stage.name, key)
    if cached is not None:
        return StageResult(name=name, manifest=cached, cached=True, seconds=0.0)
    why = _why(store.history(stage.name), stage, digest, tuple(m.sha256 for m in inputs.values()))
    manifest = Manifest(
        kind=stage.kind,
        uri=Path("/planned", stage.name).as_uri(),
        sha256=PLANNED,
        schema_version=1,
        stage=stage.name,
        stage_version=stage.version,
        config_digest=digest,
        extra=planned_facts().as_extra() if planned_facts else {},
    )
    return StageResult(name=name, manifest=manifest, cached=False, seconds=0.0, why=why)


def _why(earlier: list[Manifest], stage: Stage, digest: str, parents: tuple[str, ...]) -> Why:
    """Why a stage runs, by comparison with its artifacts of earlier runs."""
    if not earlier:
        return "new"
    same_data = [m for m in earlier if m.parents == parents]
    same_settings = [m for m in earlier if (m.config_digest, m.stage_version) == (digest, stage.version)]
    if any(m in same_settings for m in same_data):
        return "damaged"
    return "data" if same_settings and not same_data else "changed"


def _as_params(config: Any) -> dict[str, Any]:
    """A stage's part of the recipe as parameters of its MLflow run, named as in the recipe."""
    fields = dict(config) if isinstance(config, Mapping) else {}
    own = fields.pop("config", {})
    fields.pop("files", None)  # digests by path: part of the stage's key, not parameters
    return {key: value for key, value in flatten({**own, **fields}).items() if value is not None}


def _compute(
    context: Context,
    stage: Stage,
    key: str,
    digest: str,
    inputs: Mapping[str, Manifest],
    compute: Callable[[RunningStage], Output],
    child: StageRun,
) -> Manifest:
    store = context.store
    running = RunningStage(stage, context, store.begin(stage.name, key), child)
    log.info("%s: running", running.name)
    start = time.monotonic()
    for role, manifest in inputs.items():
        child.dataset(
            role, manifest.sha256, manifest.rows, manifest.uri, _CONTEXTS.get(manifest.kind, "training")
        )
    finished = False
    try:
        output = compute(running)
        facts = _checked_facts(stage, output.facts, time.monotonic() - start)
        # Record all numbers before the artifact is stored: a stage killed after that is not run again.
        child.metrics(output.metrics | {"cost/seconds": time.monotonic() - start})
        info = ArtifactInfo(
            kind=stage.kind,
            stage_version=stage.version,
            config_digest=digest,
            parents=[m.sha256 for m in inputs.values()],
            rows=output.rows,
            parameters=output.parameters,
            extra=facts.as_extra(),
        )
        manifest = store.commit(stage.name, key, output.files, info)
        child.record_artifact(manifest)
        finished = True
    except DpoError:
        raise
    except Exception as error:
        fault = disk_fault(error, store.workspace, f"stage {stage.name}")
        if fault:
            raise fault from error
        raise
    except BaseException as error:
        context.stop.begin(error)
        raise
    finally:
        for bar in running._bars:
            bar.close(finished)
    return manifest


def _checked_facts(stage: Stage, facts: Facts, seconds: float) -> Facts:
    """The facts with the stage's time; a TypeError if they are not of the class that the stage declares."""
    if type(facts) is not stage.facts:
        actual, declared = type(facts).__name__, stage.facts.__name__
        raise TypeError(f"stage {stage.name} returned {actual}, but declares {declared}")
    return facts if facts.seconds is not None else facts.model_copy(update={"seconds": seconds})


_CONTEXTS = {"model": "reference", "reference-logps": "reference", "evaluation": "evaluation"}


def _announce(context: Context, name: str, result: StageResult) -> None:
    manifest = result.manifest
    size = f"{manifest.rows:,} rows" if manifest.rows is not None else ""
    if manifest.parameters is not None:
        size = f"{manifest.parameters:,} parameters"
    state = "cached" if result.cached else f"{result.seconds:.1f} s"
    log.info("%s: %s%s", name, state, f", {size}" if size else "")
    facts = "\n".join(
        f"| {name} | `{value}` |"
        for name, value in {
            "state": state,
            "artifact": manifest.sha256,
            "where": manifest.uri,
            "size": size or "-",
            "made from": ", ".join(p[:12] for p in manifest.parents) or "-",
            **scalar_facts(manifest),
        }.items()
    )
    text = f"| {name} | |\n| --- | --- |\n{facts}"
    context.prefect_artifacts.send(
        lambda: create_markdown_artifact(key=f"stage-{artifact_key(name)}", markdown=text, description=state)
    )
