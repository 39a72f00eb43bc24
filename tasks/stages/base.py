"""What every stage shares: look in the store, or do the work under a lock; MLflow child, artifact, progress.

A stage is a function from manifests and its slice of the recipe to files. It sees neither Prefect nor MLflow;
`run_stage` wraps it in both.
"""

import logging
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec, TypeVar

from prefect import task
from prefect.artifacts import create_markdown_artifact, create_progress_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE

from deploy.launchers import Cluster, Launcher, launcher_of
from deploy.launchers.warm import JobServer
from dpo_core.config import Config
from dpo_core.errors import DpoError, without_secrets
from dpo_core.jobs.files import InferenceConfig
from tasks.runs.references import note_need
from tasks.signals import Stop
from tasks.stages.prefect_artifacts import PrefectArtifacts
from tasks.store.facts import Facts, scalar_facts
from tasks.store.files import disk_fault
from tasks.store.manifest import PLANNED, Manifest, digest_config, stage_key
from tasks.store.store import ArtifactInfo, Store
from tasks.tracking.mlflow_run import StageRun, flatten
from tasks.tracking.tracker import Tracker

if TYPE_CHECKING:
    from dpo_core.estimates import estimate
    from tasks.stages.workload import Workload

    Estimate = Callable[[Workload, str], estimate.Work]
    Settings = Callable[[Workload, str], tuple[str, Any]]

log = logging.getLogger("dpo")


@dataclass(frozen=True)
class Stage:
    """A stage's identity: raising the version makes it run again everywhere."""

    name: str
    version: int
    kind: str
    """Of its artifact."""
    facts: type[Facts]
    """What it states about its artifact."""
    estimate: "Estimate | None" = None
    """What it would compute in a run to come, by its label; None: nothing with the model."""
    overhead: float = 2.0
    """Seconds that it takes whatever its size: starting processes, loading a model, writing artifacts."""
    settings: "Settings | None" = None
    """Of a training, by its label: where the recipe has its settings (`reward.model`), and the settings."""
    job: Literal["none", "one rank", "shared"] = "none"
    """Of a stage without training, what its job needs: none, it works in the flow's process; a single rank
    without a GPU; or the ranks of the recipe's `inference`."""
    subject: str = ""
    """Of a data gate, what it judges; what passes is what the whole run learns from."""


@dataclass
class Output:
    """What the work of a stage produced."""

    files: Path | Mapping[str, Path]
    rows: int | None = None
    parameters: int | None = None
    facts: Facts = field(default_factory=Facts)
    metrics: dict[str, float] = field(default_factory=dict)


# Why a stage would run: it never did here; its settings or its code are not those of earlier runs; it reads
# other data, or data that are still to be made; what it made is no longer whole.
Why = Literal["new", "changed", "data", "damaged"]


class StageResult(Config):
    """What the flow hands on: the manifest, and how it came about."""

    name: str
    """The stage's, with its label."""
    manifest: Manifest
    """The artifact."""
    cached: bool
    """Whether an earlier run had made it."""
    seconds: float
    """Time of this stage in this run."""
    mlflow_run_id: str | None = None
    """The stage's child run; none when it was cached."""
    why: Why | None = None
    """In a plan, why the stage would run."""


@dataclass(frozen=True)
class Context:
    """The run around its stages, which every task of it is handed: its name and its live objects.

    Not plain data: all tasks of a run work in the process of its flow. Prefect searches the parameters of a
    task, and their fields, for futures; it neither looks into these objects nor copies them.
    """

    run_id: str
    """Name of the alignment run."""
    store: Store
    """The workspace's artifacts."""
    tracker: Tracker
    """The run in MLflow. In a plan it is not opened."""
    stop: Stop
    """Whether the run is being stopped."""
    cluster: Cluster | None = None
    """Where its jobs run; None: on this machine."""
    ranks: InferenceConfig = field(default_factory=InferenceConfig)
    """Of its jobs that sample, score or evaluate."""
    server: JobServer = field(default_factory=JobServer)
    """Starts jobs of one process on this machine; whoever makes the context closes it."""
    prefect_artifacts: PrefectArtifacts = field(default_factory=PrefectArtifacts)
    label: str = ""
    """What tells this stage from others of its name in the run: " DPO beta=0.1 seed 0"."""
    plan: bool = False
    """Only look what the store holds. A stage that would have to run hands on a `planned` manifest."""

    @property
    def workspace(self) -> Path:
        """The workspace, absolute."""
        return self.store.workspace

    def launcher(self, job: str, *, one_rank: bool = False) -> Launcher:
        """The launcher for a job of this name.

        Args:
            one_rank: the job is done by a single rank without a GPU.
        """
        cluster = self.cluster.for_one_rank() if self.cluster and one_rank else self.cluster
        return launcher_of(cluster, job, self.stop.hurry, self.server)

    def labelled(self, label: str) -> "Context":
        """The same run, for stages that have this label."""
        return replace(self, label=label)


_LINE_SECONDS = 60.0


class Progress:
    """One progress bar on the terminal, else a line a minute; one in Prefect (every few seconds)."""

    def __init__(self, stage: str, total: int, context: Context) -> None:
        self.stage, self.total = stage, max(total, 1)
        self._stop, self._prefect = context.stop, context.prefect_artifacts
        self._told = time.monotonic()
        self._bar: Any = None
        self._sent = time.monotonic()
        key = f"progress-{slug(stage)}"
        self._artifact: Any = self._prefect.send(
            lambda: create_progress_artifact(progress=0.0, key=key, description=stage)
        )
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.markup import escape
            from rich.progress import Progress as Bar

            self._bar = Bar(console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task(escape(stage), total=self.total)

    def update(self, done: int) -> None:
        """So many of the total are done."""
        self._stop.check()
        if self._bar:
            self._bar.update(self._task, completed=done)
        elif time.monotonic() - self._told > _LINE_SECONDS:
            self._told = time.monotonic()
            log.info("%s: %d of %d", self.stage, done, self.total)
        if time.monotonic() - self._sent > 3.0:
            self._send(done)

    def _send(self, done: int) -> None:
        self._sent = time.monotonic()
        share = min(100.0, 100.0 * done / self.total)
        if self._artifact is not None:
            self._prefect.send(lambda: update_progress_artifact(artifact_id=self._artifact, progress=share))

    def close(self, finished: bool) -> None:
        """Take the bar away; a finished stage stands at 100 %."""
        if self._bar:
            self._bar.stop()
        if finished:
            self._send(self.total)


@dataclass
class Work:
    """What the work of a stage is given."""

    stage: Stage
    context: Context
    scratch: Path
    """Survives a kill: checkpoints and partial results may lie here."""
    mlflow: StageRun
    _bars: list[Progress] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The stage's, with its label."""
        return self.stage.name + self.context.label

    def progress(self, total: int) -> Progress:
        """Start a progress bar over `total` units."""
        bar = Progress(self.name, total, self.context)
        self._bars.append(bar)
        return bar

    def fresh(self, name: str) -> Path:
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
    """A function as a Prefect task that keeps no result, and whose errors name no secret."""

    def wrap(function: Callable[Q, R]) -> Callable[Q, R]:
        return task(
            name=name,
            task_run_name=task_run_name or name,
            # Manifests decide what is cached, in the store; Prefect's own caching would not check the files.
            cache_policy=NO_CACHE,
            persist_result=False,
            log_prints=False,
        )(without_secrets()(function))

    return wrap


def stage_task(name: str, task_run_name: str | None = None) -> Callable[[StageFunction[P]], StageFunction[P]]:
    """A stage as a Prefect task; in a plan as the plain function, which asks no server."""

    def wrap(function: StageFunction[P]) -> StageFunction[P]:
        tracked = run_task(name, task_run_name)(function)

        @wraps(function)
        def call(context: Context, *args: P.args, **kwargs: P.kwargs) -> StageResult:
            return (function if context.plan else tracked)(context, *args, **kwargs)

        return call

    return wrap


def slug(name: str) -> str:
    """A name as Prefect wants the key of an artifact: small letters, digits, single dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def run_stage(
    context: Context,
    stage: Stage,
    inputs: Mapping[str, Manifest],
    config: Any,
    work: Callable[[Work], Output],
    *,
    total_steps: int | None = None,
    ahead: Callable[[], Facts] | None = None,
) -> StageResult:
    """The stage's artifact: from the store if it is there and whole, else by doing the work.

    Args:
        inputs: what the stage reads, by role; their digests are part of the key.
        config: everything else that decides the result (models, numbers, strings).
        total_steps: optimiser steps that will be reported, for even thinning of long curves.
        ahead: facts of the result that a plan can state before the work is done.
    """
    start = time.monotonic()
    name = stage.name + context.label
    store, tracker = context.store, context.tracker
    digest = digest_config(config)
    key = stage_key(stage.name, stage.version, digest, {role: m.sha256 for role, m in inputs.items()})
    if context.plan:
        return _look(store, stage, name, key, digest, inputs, ahead)
    note_need(store, context.run_id, stage.name, key, [m.sha256 for m in inputs.values()])
    found = store.lookup(stage.name, key)
    child: StageRun | None = None
    if found is None:
        with store.lock(stage.name, key):
            found = store.lookup(stage.name, key)
            if found is None:
                tags = {"dpo.config_digest": digest, "dpo.run": context.run_id}
                with tracker.child(name, total_steps=total_steps, tags=tags) as child:
                    child.params(_as_params(config))
                    found = _do(context, stage, key, digest, inputs, work, child)
    if child is None:
        context.tracker.close_stage(name, found, _as_params(config), total_steps)
    if stage.subject:
        context.tracker.parent.dataset(stage.subject, found.sha256, found.rows, found.uri, "training")
    result = StageResult(
        name=name,
        manifest=found,
        cached=child is None,
        seconds=time.monotonic() - start,
        mlflow_run_id=child.run_id if child else None,
    )
    _announce(context, name, result)
    return result


def _look(
    store: Store,
    stage: Stage,
    name: str,
    key: str,
    digest: str,
    inputs: Mapping[str, Manifest],
    ahead: Callable[[], Facts] | None,
) -> StageResult:
    """What `run_stage` would find, without a trace on the disk."""
    known = not any(manifest.planned for manifest in inputs.values())
    found = store.peek(stage.name, key) if known else None
    if found is not None:
        return StageResult(name=name, manifest=found, cached=True, seconds=0.0)
    why = _why(store.history(stage.name), stage, digest, tuple(m.sha256 for m in inputs.values()))
    planned = Manifest(
        kind=stage.kind,
        uri=Path("/planned", stage.name).as_uri(),
        sha256=PLANNED,
        schema_version=1,
        stage=stage.name,
        stage_version=stage.version,
        config_digest=digest,
        extra=ahead().as_extra() if ahead else {},
    )
    return StageResult(name=name, manifest=planned, cached=False, seconds=0.0, why=why)


def _why(earlier: list[Manifest], stage: Stage, digest: str, parents: tuple[str, ...]) -> Why:
    """Why a stage runs, from what it made in earlier runs."""
    if not earlier:
        return "new"
    same_data = [m for m in earlier if m.parents == parents]
    same_settings = [m for m in earlier if (m.config_digest, m.stage_version) == (digest, stage.version)]
    if any(m in same_settings for m in same_data):
        return "damaged"
    return "data" if same_settings and not same_data else "changed"


def _as_params(config: Any) -> dict[str, Any]:
    """A stage's slice of the recipe as parameters of its run, named as in the recipe."""
    given = dict(config) if isinstance(config, Mapping) else {}
    own = given.pop("config", {})
    given.pop("files", None)  # digests under paths: in the stage's key, and no parameters
    return {key: value for key, value in flatten({**own, **given}).items() if value is not None}


def _do(
    context: Context,
    stage: Stage,
    key: str,
    digest: str,
    inputs: Mapping[str, Manifest],
    work: Callable[[Work], Output],
    child: StageRun,
) -> Manifest:
    store = context.store
    given = Work(stage, context, store.begin(stage.name, key), child)
    log.info("%s: running", given.name)
    start = time.monotonic()
    for role, manifest in inputs.items():
        child.dataset(
            role, manifest.sha256, manifest.rows, manifest.uri, _CONTEXTS.get(manifest.kind, "training")
        )
    finished = False
    try:
        output = work(given)
        facts = _checked(stage, output.facts, time.monotonic() - start)
        # All numbers before the result is stored: a stage that is killed after that is not done again.
        child.metrics(output.metrics | {"cost/seconds": time.monotonic() - start})
        about = ArtifactInfo(
            kind=stage.kind,
            stage_version=stage.version,
            config_digest=digest,
            parents=[m.sha256 for m in inputs.values()],
            rows=output.rows,
            parameters=output.parameters,
            extra=facts.as_extra(),
        )
        manifest = store.commit(stage.name, key, output.files, about)
        child.made(manifest)
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
        for bar in given._bars:
            bar.close(finished)
    return manifest


def _checked(stage: Stage, facts: Facts, seconds: float) -> Facts:
    """The facts that the work stated, which are those of the stage, with the time that it took."""
    if type(facts) is not stage.facts:
        stated, declared = type(facts).__name__, stage.facts.__name__
        raise TypeError(f"stage {stage.name} stated {stated}, and declares {declared}")
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
        lambda: create_markdown_artifact(key=f"stage-{slug(name)}", markdown=text, description=state)
    )
