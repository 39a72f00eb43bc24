"""Records an alignment in MLflow: one parent run per alignment, one child run per stage.

After the parent run is created, every write goes through the retry queue, so that an outage only delays it.
"""

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import yaml
from mlflow import MlflowClient

from dpo_core.errors import RecipeError, StageFailed
from tasks.provenance import environment, source_tags
from tasks.recipe.sections import TrackingConfig
from tasks.signals import signals_deferred
from tasks.store.files import disk_fault, open_workspace
from tasks.store.manifest import Manifest
from tasks.tracking.database import make_database
from tasks.tracking.mlflow_calls import create_if_missing
from tasks.tracking.mlflow_run import TAG_CHARS, StageRun, TrackedRun, clean_key, cut, flatten
from tasks.tracking.outbox import (
    FOLDER,
    PATIENCE,
    Outbox,
    Write,
    one_line,
    read_saved,
    remove_saved,
    saved_folders,
)

log = logging.getLogger(__name__)
terminal = logging.getLogger("dpo")
T = TypeVar("T")

_HEADLINE_PARAMS = 200
# Without this tag MLflow's UI may show the experiment as one of prompts and traces.
_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
_START_PATIENCE = 30.0
_STAGE_TAG = "dpo.stage"
_RUN_PATIENCE = 180.0


def resolve_uri(config: TrackingConfig, workspace: Path) -> str:
    """The tracking URI as an absolute one, independent of the working directory.

    Raises:
        RecipeError: it names MLflow's file store, which MLflow dropped in 3.13, or the workspace's path
            contains a character that a URI cannot contain.
    """
    uri = config.uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri and "?" in str(workspace.absolute()):
        raise RecipeError(
            f"the workspace's path, {workspace}, contains a question mark, which would end the address of "
            "its tracking database",
            "Choose another workspace, or set tracking.uri or MLFLOW_TRACKING_URI",
        )
    uri = uri or f"sqlite:///{workspace / 'mlflow.db'}"
    if ("://" not in uri and uri != "databricks") or uri.startswith("file:"):
        raise RecipeError(
            f"tracking URI {uri} is a folder, which MLflow no longer writes to",
            "Use sqlite:///<absolute path>.db or the http:// URL of an MLflow server, or remove the setting.",
        )
    if uri.startswith("sqlite:///"):
        uri = f"sqlite:///{Path(uri.removeprefix('sqlite:///')).absolute()}"
    return uri


class Tracker:
    """Records one alignment in MLflow.

    Raises:
        RecipeError: the tracking URI cannot be used.
    """

    def __init__(self, config: TrackingConfig, workspace: str | Path) -> None:
        self.workspace = open_workspace(workspace)
        self.uri = resolve_uri(config, self.workspace)
        self._config = config
        self._client: Any = None
        self.run_id = ""
        self.run_name = ""
        self.experiment_id = ""
        self._unfinished: set[str] = set()
        self._stages: list[StageRun] = []

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
        self._connect()
        self.run_name = name
        experiment = self._config.experiment or f"dpo/{recipe.get('name') or name}"
        every = {**self._config.tags, **(tags or {}), **source_tags()}
        if description:
            every["mlflow.note.content"] = description
        every = {clean_key(key): cut(value, TAG_CHARS) for key, value in every.items()}

        def open_run() -> Any:
            known = run_id or (self._opened_before(experiment, every) if reopen else None)
            if known is None:
                return self._client.create_run(self._experiment(experiment), tags=every, run_name=name).info
            info = self._client.get_run(known).info
            self._client.update_run(known, status="RUNNING")
            with suppress(Exception):  # the tag may not exist
                self._client.delete_tag(known, "dpo.error")
            for key, value in every.items():
                self._client.set_tag(known, key, value)
            self._unfinished = self._stages_without_end(info)
            return info

        what = f"run {run_id}" if run_id else f"experiment {experiment}"
        self._send_saved(run_id)
        info = self._must(what, open_run)
        self.run_id, self.experiment_id = info.run_id, info.experiment_id
        self.parent = TrackedRun(self._client, self._outbox, self.run_id, info.start_time)
        self._outbox.folder = self.workspace / FOLDER / self.run_id
        opened(self.run_id)
        self.parent.text(
            yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True), "config/recipe.yaml"
        )
        self.parent.text(json.dumps(environment(), indent=1), "environment.json")
        facts = {key: value for key, value in recipe.items() if key != "description"}
        settings = {key: value for key, value in flatten(facts).items() if value is not None}
        headline = sorted(settings, key=lambda key: key.count("."))[:_HEADLINE_PARAMS]
        self.parent.params({key: settings[key] for key in headline})
        return self.run_id

    def finish_parent(self, status: str = "FINISHED") -> None:
        """End the parent run with FINISHED, FAILED or KILLED; logs a warning if some writes were not sent."""
        self.parent.end(status)
        if self._outbox.drain(PATIENCE[status]) and self._outbox.delay_s >= 1:
            self.parent.tag("dpo.tracking_delay_s", round(self._outbox.delay_s))
        safe = self._save()
        if self._outbox.queue:
            waiting = sorted({write.what for write in self._outbox.queue})
            log.warning(
                "MLflow at %s did not accept %d writes (%s); the artifacts are complete, and %s",
                self._outbox.place,
                len(self._outbox.queue),
                cut(", ".join(waiting), 500),
                f"the next run of this workspace, or --resume {self.run_name}, sends the writes saved in "
                f"{self._outbox.folder}"
                if safe
                else "these writes are lost: they could not be saved to disk either",
            )

    def _save(self) -> bool:
        return self._outbox.save(lambda run: run is self.parent or run in self._stages)

    def _send_saved(self, resumed: str | None) -> None:
        """Send the saved writes of this workspace's earlier runs, before anything new."""
        for folder in saved_folders(self.workspace):
            parent = TrackedRun(self._client, self._outbox, folder.name)
            runs: dict[str, TrackedRun] = {"": parent}
            saved = read_saved(folder, self._outbox.place)
            if saved is None:
                continue
            # A resumed run repeats its parent's writes and has no end yet: skip them.
            writes = [w for w in saved if not (folder.name == resumed and w["stage"] == "")]
            if writes:
                terminal.info("sending %d MLflow writes that an earlier run could not send", len(writes))
            for facts in writes:
                stage = facts["stage"]
                run = runs.setdefault(stage, StageRun(self._client, self._outbox, stage, None))
                run.run_id = run.run_id or facts["run_id"]  # None if the stage's run was never created
                self._outbox.put(Write(facts["what"], run, facts["call"], facts["given"]))
            if self._outbox.drain():
                remove_saved(folder)

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

    @contextmanager
    def child(
        self, stage: str, *, total_steps: int | None = None, tags: Mapping[str, str] | None = None
    ) -> Iterator[StageRun]:
        """The child run of a stage; a resume reopens the existing one.

        It ends as FINISHED, as FAILED if the stage raises (the message is in the tag `dpo.error`), or as
        KILLED if the stage is interrupted. The stage's exception is re-raised unchanged.
        """
        run = StageRun(self._client, self._outbox, stage, total_steps)
        self._stages.append(run)
        run.open(
            self.experiment_id,
            self.run_id,
            {key: cut(value, TAG_CHARS) for key, value in (tags or {}).items()},
        )
        try:
            yield run
        except BaseException as error:
            # Interrupts and the signals of orchestrators are BaseExceptions, not Exceptions.
            run.close("FAILED" if isinstance(error, Exception) else "KILLED", error)
            raise
        else:
            run.close("FINISHED")
        finally:
            self._save()

    def close_stage(
        self,
        stage: str,
        artifact: Manifest,
        params: Mapping[str, Any] | None = None,
        total_steps: int | None = None,
    ) -> None:
        """End the child run of a stage whose artifact exists but which did not end its run itself.

        The process was killed after it stored the artifact, the disk failed at that moment, or another run
        made the artifact since. Does nothing if the stage had no unfinished run when the parent was opened.
        """
        if stage not in self._unfinished:
            return
        self._unfinished.discard(stage)
        with self.child(stage, total_steps=total_steps) as run:
            run.params(params or {})
            run.metrics_from_jsonl(artifact.path / "metrics.jsonl")
            run.record_artifact(artifact)

    def ask(self, what: str, call: Callable[[Any], T]) -> T:
        """Call `call` with MLflow's client and return its result; repeats the call during an outage.

        Raises:
            StageFailed: MLflow does not answer.
            RecipeError: MLflow rejects the request.
        """
        self._connect()
        return self._must(what, lambda: call(self._client))

    def describe_version(self, name: str, version: str, text: str) -> None:
        """Set the Markdown description of a registered version."""
        text = cut(text, TAG_CHARS)
        what = f"description of {name} {version}"
        self._outbox.put(Write(what, self.parent, "send_description", [name, version, text]))

    def _opened_before(self, experiment: str, tags: Mapping[str, str]) -> str | None:
        known = self._client.get_experiment_by_name(experiment)
        if known is None or "dpo.run" not in tags:
            return None
        query = f"tags.`dpo.run` = '{tags['dpo.run']}'"
        runs = self._client.search_runs([known.experiment_id], query)
        # Child runs have the tag too.
        return next((run.info.run_id for run in runs if _STAGE_TAG not in run.data.tags), None)

    def _stages_without_end(self, parent: Any) -> set[str]:
        query = f"tags.`mlflow.parentRunId` = '{parent.run_id}' and attributes.status != 'FINISHED'"
        runs = self._client.search_runs([parent.experiment_id], query, max_results=1000)
        return {run.data.tags[_STAGE_TAG] for run in runs if _STAGE_TAG in run.data.tags}

    def _connect(self) -> None:
        if self._client is not None:
            return
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("DO_NOT_TRACK", "1")
        # MLflow's own seven retries block a call for minutes; the retry queue waits instead.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        logging.getLogger("alembic").setLevel(logging.WARNING)
        # It logs the traceback of each error that it raises; the retry queue logs one line.
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
        try:
            make_database(self.uri)
        except OSError as error:
            raise RecipeError(
                f"the tracking database's folder {error.filename} is not writable: {error.strerror}",
                "Make it writable, or set tracking.uri.",
            ) from error
        client = self._unlocked(
            lambda: MlflowClient(self.uri, os.environ.get("MLFLOW_REGISTRY_URI") or self.uri)
        )
        self._outbox = Outbox(self.uri, lambda: client.search_experiments(max_results=1))
        self._client = client

    def _unlocked(self, opened: Callable[[], T]) -> T:
        """Open MLflow's client; wait if another process has locked the SQLite file, which opening reads."""
        deadline = time.monotonic() + _START_PATIENCE
        while True:
            try:
                with signals_deferred():
                    return opened()
            except Exception as error:
                if "database is locked" not in str(error):
                    raise
                if time.monotonic() > deadline:
                    raise StageFailed(
                        f"the tracking database {self.uri} is locked by another process",
                        "End the run or program that holds the lock, then resume the run.",
                    ) from error
                time.sleep(0.5)

    def _experiment(self, name: str) -> str:
        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            # Without a server MLflow would put artifacts below the working directory.
            local = "://" in self.uri and not self.uri.startswith("http")
            location = (self.workspace / "mlartifacts").as_uri() if local else None
            create_if_missing(lambda: self._client.create_experiment(name, location, dict(_EXPERIMENT_TAGS)))
            experiment = self._client.get_experiment_by_name(name)
        if experiment.lifecycle_stage != "active":
            raise RecipeError(
                f"the experiment {name} was deleted in MLflow",
                f"Restore it (mlflow experiments restore -x {experiment.experiment_id}) or use another name.",
            )
        return str(experiment.experiment_id)

    def _must(self, what: str, call: Callable[[], T]) -> T:
        """Make a call whose answer is needed now; waits for MLflow for a limited time."""
        # In the middle of a run, work would be lost: wait longer.
        deadline = time.monotonic() + (_RUN_PATIENCE if self.run_id else _START_PATIENCE)
        while True:
            try:
                with self._outbox.protected():
                    return call()
            except (RecipeError, StageFailed):
                raise
            except Exception as error:
                if getattr(error, "error_code", "") == "UNAUTHENTICATED":
                    raise RecipeError(
                        f"MLflow at {self._outbox.place} requires a valid user name and password",
                        "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
                    ) from error
                if not self._outbox.is_outage(error):
                    raise RecipeError(
                        f"MLflow at {self._outbox.place} refused {what}: {one_line(error)}",
                        "Check tracking.uri and the name in the message.",
                    ) from error
                if self.uri.startswith("sqlite:"):
                    fault = disk_fault(error, self.workspace, f"recording {what} in MLflow")
                    if fault:  # waiting does not free disk space
                        raise fault from error
                if time.monotonic() > deadline:
                    raise StageFailed(
                        f"MLflow at {self._outbox.place} does not answer: {one_line(error)[:300]}",
                        "Start the server or correct tracking.uri, then resume the run.",
                    ) from error
                time.sleep(1)
