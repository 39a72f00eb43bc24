"""Records an alignment in MLflow: one parent run per alignment, one child run per stage.

MLflow must answer when the parent run is created. After that an outage only delays what is recorded: at the
end of each stage and of the run, what MLflow does not have is saved in the workspace, and the next run of the
workspace, or the resumed one, sends it:

    tracking_outbox/<parent run>/<stage>.json   what one run lacks, see `mlflow_run.Unsent`
    tracking_outbox/<parent run>/files/         copies of the files that it lacks
"""

import json
import logging
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar
from urllib.parse import quote

import yaml
from filelock import FileLock, Timeout

from dpo_core.checked_json import read_checked, write_checked
from dpo_core.errors import RecipeError, StageFailed
from tasks.provenance import environment, source_tags
from tasks.recipe.sections import TrackingConfig
from tasks.store.files import open_workspace
from tasks.store.manifest import Manifest
from tasks.tracking.connection import (
    RUN_PATIENCE,
    START_PATIENCE,
    Connection,
    create_if_missing,
    resolve_uri,
)
from tasks.tracking.mlflow_run import (
    STAGE_TAG,
    TAG_CHARS,
    StageRun,
    TrackedRun,
    Unsent,
    clean_key,
    cut,
    flatten,
)

log = logging.getLogger(__name__)
terminal = logging.getLogger("dpo")
T = TypeVar("T")

PATIENCE = {"FINISHED": 30.0, "FAILED": 30.0, "KILLED": 5.0}  # seconds to wait for MLflow when a run ends
FOLDER = "tracking_outbox"
_LOCK = ".lock"
_HEADLINE_PARAMS = 200
VIEW = "dpo"
"""Name of a shared view of each experiment: `?viewStateShareKey=dpo` at the end of its address in the UI."""
# MLflow's UI keeps the columns of its table of runs in the browser; others see them only in a shared view.
_VIEW_STATE = {
    "selectedColumns": ["tags.`dpo.verdict`", "metrics.`gain`"],
    "columnOrder": [],
    "columnWidths": {},
    "runsExpanded": {},
    "runsPinned": [],
    "runsHidden": [],
    "runsVisibilityMap": {},
    "runsHiddenMode": "FIRST_10_RUNS",
    "viewMaximized": False,
    "runListHidden": False,
    "isAccordionReordered": False,
    "useGroupedValuesInCharts": True,
    "hideEmptyCharts": True,
    "groupBy": None,
    "groupsExpanded": {},
    "autoRefreshEnabled": True,
    "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""},
}
_EXPERIMENT_TAGS = {
    # Without this tag MLflow's UI may show the experiment as one of prompts and traces.
    "mlflow.experimentKind": "custom_model_development",
    f"mlflow.sharedViewState.{VIEW}": json.dumps(_VIEW_STATE),
}


class Tracker:
    """Records one alignment in MLflow.

    Raises:
        RecipeError: the tracking URI cannot be used.
    """

    def __init__(self, config: TrackingConfig, workspace: str | Path) -> None:
        self.workspace = open_workspace(workspace)
        self.uri = resolve_uri(config, self.workspace)
        self.connection = Connection(self.uri, self.workspace)
        self._config = config
        self.run_id = ""
        self.run_name = ""
        self.experiment_id = ""
        self._unfinished: set[str] = set()
        self._stages: list[StageRun] = []
        self._lock: FileLock | None = None

    def start_parent(
        self,
        name: str,
        *,
        recipe: Mapping[str, Any],
        run_id: str | None = None,
        reopen: bool = False,
        description: str = "",
        tags: Mapping[str, str] | None = None,
        opened: Callable[[str], None] = lambda run_id: None,
    ) -> str:
        """Create the parent run of an alignment, or reopen `run_id`; returns its id.

        Args:
            recipe: the resolved recipe in JSON types; stored as `config/recipe.yaml`, its outermost values
                as parameters.
            reopen: if there is no `run_id`, reopen the run with the same tag `dpo.run`. A process may have
                created it and been killed before it recorded the id.
            description: Markdown for the run's page.
            opened: called with the id as soon as it is known, before anything else is sent.

        Raises:
            StageFailed: MLflow does not answer.
            RecipeError: the run `run_id` does not exist, or the database cannot be used.
        """
        self.run_name = name
        experiment = self._config.experiment or f"dpo/{recipe.get('name') or name}"
        every = {**self._config.tags, **(tags or {}), **source_tags()}
        if description:
            every["mlflow.note.content"] = description
        every = {clean_key(key): cut(value, TAG_CHARS) for key, value in every.items()}

        def open_run(client: Any) -> Any:
            known = run_id or (self._opened_before(client, experiment, every) if reopen else None)
            if known is None:
                return client.create_run(self._experiment(client, experiment), tags=every, run_name=name)
            run = client.get_run(known)
            client.update_run(known, status="RUNNING")
            with suppress(Exception):  # the tag may not exist
                client.delete_tag(known, "dpo.error")
            self._unfinished = self._stages_without_end(client, run.info)
            return run

        self._send_saved(run_id)
        run = self.ask(f"run {run_id}" if run_id else f"experiment {experiment}", open_run)
        self.run_id, self.experiment_id = run.info.run_id, run.info.experiment_id
        unsent = Unsent(run_id=self.run_id, start_ms=run.info.start_time)
        self.parent = TrackedRun(self.connection, unsent, self._keep_file)
        self.ask("the run's metrics", lambda _: self.parent.read_points(run))
        opened(self.run_id)
        self._drop_repeated()
        self.parent.tags(every)
        facts = {key: value for key, value in recipe.items() if key != "description"}
        settings = {key: value for key, value in flatten(facts).items() if value is not None}
        headline = sorted(settings, key=lambda key: key.count("."))[:_HEADLINE_PARAMS]
        self.parent.params({key: settings[key] for key in headline})
        self._upload_texts(recipe)
        return self.run_id

    def _upload_texts(self, recipe: Mapping[str, Any]) -> None:
        with TemporaryDirectory() as folder:
            texts = Path(folder) / "recipe.yaml", Path(folder) / "environment.json"
            text = yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True)
            texts[0].write_text(text, encoding="utf-8")
            texts[1].write_text(json.dumps(environment(), indent=1), encoding="utf-8")
            self.parent.artifact(texts[0], "config")
            self.parent.artifact(texts[1])

    def finish_parent(self, status: str = "FINISHED") -> None:
        """End the parent run with FINISHED, FAILED or KILLED; logs a warning if MLflow lacks something."""
        self.parent.end(status)
        deadline = time.monotonic() + PATIENCE[status]
        runs = [self.parent, *self._stages]
        waiting = list(runs)
        while waiting:
            run = waiting.pop(0)
            if run.send(force=True):
                continue
            waiting.append(run)  # MLflow may accept those of the other runs
            if time.monotonic() > deadline or self.connection.disk_fault:  # waiting does not free disk space
                break
            time.sleep(0.5)
        unsaved = [run for run in runs if not self._save(run)]
        if not unsaved and not any(self._outbox.glob("*.json")):
            _remove(self._outbox)
            self._release_outbox()
            return
        self._release_outbox()
        log.warning(
            "MLflow at %s did not accept all writes; the artifacts are complete, and %s",
            self.connection.place,
            "these writes are lost: they could not be saved to disk either"
            if unsaved
            else f"the next run of this workspace, or --resume {self.run_name}, sends the writes saved in "
            f"{self._outbox}",
        )

    @contextmanager
    def child(self, stage: str, *, tags: Mapping[str, str] | None = None) -> Iterator[StageRun]:
        """The child run of a stage; a resume reopens the existing one.

        It ends as FINISHED, as FAILED if the stage raises (the message is in the tag `dpo.error`), or as
        KILLED if the stage is interrupted. The stage's exception is re-raised unchanged.
        """
        start = int(time.time() * 1000)  # even if MLflow is away now
        unsent = Unsent(self.experiment_id, self.run_id, stage, start_ms=start)
        run = StageRun(self.connection, unsent, self._keep_file)
        self._stages.append(run)
        run.tags(tags or {})
        try:
            yield run
        except BaseException as error:
            # Interrupts and the signals of orchestrators are BaseExceptions, not Exceptions.
            run.close("FAILED" if isinstance(error, Exception) else "KILLED", error)
            raise
        else:
            run.close("FINISHED")
        finally:
            self._save(run)

    def close_stage(
        self,
        stage: str,
        artifact: Manifest,
        params: Mapping[str, Any] | None = None,
    ) -> None:
        """End the child run of a stage whose artifact exists but which did not end its run itself.

        The process was killed after it stored the artifact, the disk failed at that moment, or another run
        made the artifact since. Does nothing if the stage had no unfinished run when the parent was opened.
        """
        if stage not in self._unfinished:
            return
        self._unfinished.discard(stage)
        with self.child(stage) as run:
            run.params(params or {})
            run.metrics_from_jsonl(artifact.path / "metrics.jsonl")
            run.record_artifact(artifact)

    def close_killed(self, run_id: str | None, reason: str) -> bool:
        """Set a killed run and its child runs from RUNNING to KILLED; False if MLflow does not have the run.

        Raises:
            StageFailed: MLflow does not answer.
        """

        def close(client: Any) -> None:
            query = f"tags.`mlflow.parentRunId` = '{run_id}' and attributes.status = 'RUNNING'"
            parent = client.get_run(run_id)
            left = [parent] if parent.info.status == "RUNNING" else []
            for run in [*client.search_runs([parent.info.experiment_id], query), *left]:
                client.set_tag(run.info.run_id, "dpo.error", reason)
                client.set_terminated(run.info.run_id, "KILLED")

        if run_id is None:
            return True
        try:
            self.ask(f"run {run_id}", close)
        except RecipeError:
            return False
        return True

    def ask(self, what: str, call: Callable[[Any], T]) -> T:
        """Call `call` with MLflow's client and return its result; repeats the call during an outage.

        Raises:
            StageFailed: MLflow does not answer.
            RecipeError: MLflow rejects the request.
        """
        # In the middle of a run, work would be lost: wait longer.
        return self.connection.must(what, call, RUN_PATIENCE if self.run_id else START_PATIENCE)

    def describe_version(self, name: str, version: str, text: str) -> None:
        """Set the Markdown description of a registered version; without an answer of MLflow it is lost."""
        what, text = f"the description of version {version} of {name}", cut(text, TAG_CHARS)
        try:
            self.connection.must(what, lambda client: client.update_model_version(name, version, text))
        except (RecipeError, StageFailed) as error:
            log.warning("%s is not set: %s", what, error)

    # What MLflow lacks, on disk -----------------------------------------------------------------------------

    @property
    def _outbox(self) -> Path:
        return self.workspace / FOLDER / self.run_id

    def _lock_outbox(self) -> None:
        """Create the outbox; other runs of the workspace leave it alone until this one ends."""
        if self._lock is None:
            self._outbox.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self._outbox / _LOCK, timeout=10, thread_local=False)
            lock.acquire()
            self._lock = lock

    def _release_outbox(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _save(self, run: TrackedRun) -> bool:
        """Save what MLflow lacks of a run; False if it would be lost with this process."""
        path = self._outbox / f"{quote(run.unsent.stage, safe='') or 'parent'}.json"
        try:
            if run.complete:
                path.unlink(missing_ok=True)
            else:
                self._lock_outbox()
                write_checked(path, {"place": self.connection.place, "unsent": asdict(run.unsent)})
        except OSError as error:
            log.warning("MLflow writes could not be saved in %s: %s", path, error)
            return False
        return True

    def _keep_file(self, path: Path) -> Path:
        copy = self._outbox / "files" / uuid.uuid4().hex[:8] / path.name
        try:
            self._lock_outbox()
            copy.parent.mkdir(parents=True)
            (shutil.copytree if path.is_dir() else shutil.copyfile)(path, copy)
        except OSError as error:
            log.warning("%s could not be copied for MLflow: %s", path, error)
            return path
        return copy

    def _send_saved(self, resumed: str | None) -> None:
        """Send what MLflow lacks of this workspace's earlier runs."""
        for folder in sorted((self.workspace / FOLDER).glob("*")):
            if folder.is_dir():
                with suppress(Timeout), FileLock(folder / _LOCK, timeout=0):  # a run at work holds it
                    self._send_folder(folder, resumed)

    def _send_folder(self, folder: Path, resumed: str | None) -> None:
        for path in sorted(folder.glob("*.json")):
            saved = read_checked(path, "MLflow will not get what is in it", keep=True)
            if saved is None or saved["place"] != self.connection.place:
                continue
            if folder.name == resumed and not saved["unsent"]["stage"]:
                continue
            terminal.info("sending MLflow what it lacks of an earlier run: %s", path)
            if TrackedRun(self.connection, Unsent(**saved["unsent"])).send():
                path.unlink(missing_ok=True)
        if not any(folder.glob("*.json")):
            _remove(folder)

    def _drop_repeated(self) -> None:
        """Remove what was saved of the parent: a resumed run repeats it, and has no end yet."""
        (self._outbox / "parent.json").unlink(missing_ok=True)
        if not any(self._outbox.glob("*.json")):
            _remove(self._outbox)

    # MLflow's runs and experiments --------------------------------------------------------------------------

    def _opened_before(self, client: Any, experiment: str, tags: Mapping[str, str]) -> str | None:
        known = client.get_experiment_by_name(experiment)
        if known is None or "dpo.run" not in tags:
            return None
        runs = client.search_runs([known.experiment_id], f"tags.`dpo.run` = '{tags['dpo.run']}'")
        # Child runs have the tag too.
        return next((run.info.run_id for run in runs if STAGE_TAG not in run.data.tags), None)

    def _stages_without_end(self, client: Any, parent: Any) -> set[str]:
        query = f"tags.`mlflow.parentRunId` = '{parent.run_id}' and attributes.status != 'FINISHED'"
        runs = client.search_runs([parent.experiment_id], query, max_results=1000)
        return {run.data.tags[STAGE_TAG] for run in runs if STAGE_TAG in run.data.tags}

    def _experiment(self, client: Any, name: str) -> str:
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            # Without a server MLflow would put artifacts below the working directory.
            local = "://" in self.uri and not self.uri.startswith("http")
            location = (self.workspace / "mlartifacts").as_uri() if local else None
            create_if_missing(lambda: client.create_experiment(name, location))
            experiment = client.get_experiment_by_name(name)
        if experiment.lifecycle_stage != "active":
            raise RecipeError(
                f"the experiment {name} was deleted in MLflow",
                f"Restore it (mlflow experiments restore -x {experiment.experiment_id}) or use another name.",
            )
        for key, value in _EXPERIMENT_TAGS.items():
            if experiment.tags.get(key) != value:
                client.set_experiment_tag(experiment.experiment_id, key, value)
        return str(experiment.experiment_id)


def _remove(outbox: Path) -> None:
    shutil.rmtree(outbox, ignore_errors=True)
    with suppress(OSError):  # other runs may have unsent writes
        outbox.parent.rmdir()
