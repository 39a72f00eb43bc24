"""MLflow tracking: one parent run an alignment, one child run a stage.

Every write after the parent's start goes through the outbox, so that a server's absence costs only delay.
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

from dpo_core.errors import RecipeError, StageFailed
from tasks.provenance import environment, source_tags
from tasks.recipe.sections import TrackingConfig
from tasks.signals import undisturbed
from tasks.store.files import disk_fault, open_workspace
from tasks.store.manifest import Manifest
from tasks.tracking.database import make_database
from tasks.tracking.mlflow_calls import unless_there
from tasks.tracking.mlflow_run import TAG_CHARS, StageRun, TrackedRun, clean_key, cut, flatten
from tasks.tracking.outbox import FOLDER, PATIENCE, Outbox, Write, forget, kept, one_line, read_kept

log = logging.getLogger(__name__)
said = logging.getLogger("dpo")
T = TypeVar("T")

_HEADLINE_PARAMS = 200
# Else MLflow's UI may take the experiment for one of prompts and traces.
_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
_START_PATIENCE = 30.0
_STAGE_TAG = "dpo.stage"
_RUN_PATIENCE = 180.0


def resolve_uri(config: TrackingConfig, workspace: Path) -> str:
    """The tracking URI, absolute whatever the working directory is later.

    Raises:
        RecipeError: it names MLflow's file store, which MLflow dropped in 3.13, or the path of the workspace
            cannot be part of an address.
    """
    uri = config.uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri and "?" in str(workspace.absolute()):
        raise RecipeError(
            f"the path of the workspace, {workspace}, has a question mark, where the address of its tracking "
            "database would end",
            "Name another workspace, or the database of runs with tracking.uri or MLFLOW_TRACKING_URI",
        )
    uri = uri or f"sqlite:///{workspace / 'mlflow.db'}"
    if ("://" not in uri and uri != "databricks") or uri.startswith("file:"):
        raise RecipeError(
            f"tracking URI {uri} is a folder, which MLflow no longer writes to",
            "Use sqlite:///<absolute path>.db, the http:// URL of an MLflow server, or leave it out.",
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
        begun: bool = False,
        description: str = "",
        tags: Mapping[str, str] | None = None,
        opened: Callable[[str], None] = lambda run_id: None,
    ) -> str:
        """Open the run of a whole alignment, or go on with `run_id`; returns its id.

        Args:
            recipe: the resolved recipe in JSON types; stored as `config/recipe.yaml`, its outermost values
                as parameters.
            begun: without a `run_id`, go on with the one that has the same tag `dpo.run`: a process may have
                opened it and been killed before it could note the id.
            description: Markdown for the run's page.
            opened: given the id as soon as there is one, before anything else is sent.

        Raises:
            StageFailed: MLflow does not answer.
            RecipeError: there is no run `run_id`, or the database cannot be used.
        """
        self._connect()
        self.run_name = name
        experiment = self._config.experiment or f"dpo/{recipe.get('name') or name}"
        every = {**self._config.tags, **(tags or {}), **source_tags()}
        if description:
            every["mlflow.note.content"] = description
        every = {clean_key(key): cut(value, TAG_CHARS) for key, value in every.items()}

        def open_run() -> Any:
            known = run_id or (self._opened_before(experiment, every) if begun else None)
            if known is None:
                return self._client.create_run(self._experiment(experiment), tags=every, run_name=name).info
            info = self._client.get_run(known).info
            self._client.update_run(known, status="RUNNING")
            with suppress(Exception):  # there need not be one
                self._client.delete_tag(known, "dpo.error")
            for key, value in every.items():
                self._client.set_tag(known, key, value)
            self._unfinished = self._stages_without_end(info)
            return info

        what = f"run {run_id}" if run_id else f"experiment {experiment}"
        self._deliver_kept(run_id)
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
        given = {key: value for key, value in flatten(facts).items() if value is not None}
        headline = sorted(given, key=lambda key: key.count("."))[:_HEADLINE_PARAMS]
        self.parent.params({key: given[key] for key in headline})
        return self.run_id

    def finish_parent(self, status: str = "FINISHED") -> None:
        """End the parent with FINISHED, FAILED or KILLED. Warns if MLflow never took some of the writes."""
        self.parent.end(status)
        if self._outbox.drain(PATIENCE[status]) and self._outbox.delay_s >= 1:
            self.parent.tag("dpo.tracking_delay_s", round(self._outbox.delay_s))
        safe = self._keep()
        if self._outbox.queue:
            waiting = sorted({write.what for write in self._outbox.queue})
            log.warning(
                "MLflow at %s did not take %d writes (%s); the artifacts are whole, and %s",
                self._outbox.place,
                len(self._outbox.queue),
                cut(", ".join(waiting), 500),
                f"the next run of this workspace, or --resume {self.run_name}, sends what waits in "
                f"{self._outbox.folder}"
                if safe
                else "these writes are lost: they could not be kept on the disk either",
            )

    def _keep(self) -> bool:
        return self._outbox.keep(lambda run: run is self.parent or run in self._stages)

    def _deliver_kept(self, resumed: str | None) -> None:
        """Send what MLflow did not take of earlier runs of this workspace, before anything new."""
        for folder in kept(self.workspace):
            parent = TrackedRun(self._client, self._outbox, folder.name)
            runs: dict[str, TrackedRun] = {"": parent}
            found = read_kept(folder, self._outbox.place)
            if found is None:
                continue
            # A run that is resumed writes all of its own again, and is not over.
            writes = [w for w in found if not (folder.name == resumed and w["stage"] == "")]
            if writes:
                said.info("sending %d MLflow writes that an earlier run could not send", len(writes))
            for facts in writes:
                stage = facts["stage"]
                run = runs.setdefault(stage, StageRun(self._client, self._outbox, stage, None))
                run.run_id = run.run_id or facts["run_id"]  # None where MLflow never heard of the stage
                self._outbox.put(Write(facts["what"], run, facts["call"], facts["given"]))
            if self._outbox.drain():
                forget(folder)

    def close_killed(self, run_id: str | None, reason: str) -> bool:
        """End a killed run and those below it that still say RUNNING as KILLED; whether it is known here.

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
        """The stage's own run below the parent; on a resume the one that it already has.

        Ends FINISHED; FAILED with the message in the tag `dpo.error` when the stage raises; KILLED when it is
        interrupted. What the stage raises goes on unchanged.
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
            # Interrupts and the signals that orchestrators raise are no Exception.
            run.close("FAILED" if isinstance(error, Exception) else "KILLED", error)
            raise
        else:
            run.close("FINISHED")
        finally:
            self._keep()

    def close_stage(
        self,
        stage: str,
        artifact: Manifest,
        params: Mapping[str, Any] | None = None,
        total_steps: int | None = None,
    ) -> None:
        """End the run of a stage that did not end it itself, though its result is there.

        It was killed after it had stored the result, or the disk was gone at that moment, or another run has
        made it since. Nothing happens where no such run was left when the parent was opened.
        """
        if stage not in self._unfinished:
            return
        self._unfinished.discard(stage)
        with self.child(stage, total_steps=total_steps) as run:
            run.params(params or {})
            run.metrics_from_jsonl(artifact.path / "metrics.jsonl")
            run.made(artifact)

    def ask(self, what: str, call: Callable[[Any], T]) -> T:
        """What MLflow answers to `call`, which is given its client and may be called again after an outage.

        Raises:
            StageFailed: MLflow does not answer.
            RecipeError: it refuses.
        """
        self._connect()
        return self._must(what, lambda: call(self._client))

    def describe_version(self, name: str, version: str, text: str) -> None:
        """Give a registered version its Markdown description."""
        text = cut(text, TAG_CHARS)
        what = f"description of {name} {version}"
        self._outbox.put(Write(what, self.parent, "send_description", [name, version, text]))

    def _opened_before(self, experiment: str, tags: Mapping[str, str]) -> str | None:
        found = self._client.get_experiment_by_name(experiment)
        if found is None or "dpo.run" not in tags:
            return None
        query = f"tags.`dpo.run` = '{tags['dpo.run']}'"
        runs = self._client.search_runs([found.experiment_id], query)
        # Stages carry the tag too.
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
        # MLflow's own seven retries hold a call for minutes; the outbox does the waiting.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        logging.getLogger("alembic").setLevel(logging.WARNING)
        # It prints the traceback of what it raises anyway, and the outbox says it in one line.
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
        from mlflow import MlflowClient

        try:
            make_database(self.uri)
        except OSError as error:
            raise RecipeError(
                f"the tracking database's folder {error.filename} cannot be written: {error.strerror}",
                "Make it writable, or set tracking.uri.",
            ) from error
        client = self._unlocked(
            lambda: MlflowClient(self.uri, os.environ.get("MLFLOW_REGISTRY_URI") or self.uri)
        )
        self._outbox = Outbox(self.uri, lambda: client.search_experiments(max_results=1))
        self._client = client

    def _unlocked(self, opened: Callable[[], T]) -> T:
        """MLflow reads a SQLite file when it opens it, which another process may hold for a while."""
        deadline = time.monotonic() + _START_PATIENCE
        while True:
            try:
                with undisturbed():
                    return opened()
            except Exception as error:
                if "database is locked" not in str(error):
                    raise
                if time.monotonic() > deadline:
                    raise StageFailed(
                        f"the tracking database {self.uri} is locked by another process",
                        "Look for a run, or another program, that hangs on it; then resume the run.",
                    ) from error
                time.sleep(0.5)

    def _experiment(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is None:
            # Without a server MLflow would put artifacts below the working directory.
            local = "://" in self.uri and not self.uri.startswith("http")
            location = (self.workspace / "mlartifacts").as_uri() if local else None
            unless_there(lambda: self._client.create_experiment(name, location, dict(_EXPERIMENT_TAGS)))
            found = self._client.get_experiment_by_name(name)
        if found.lifecycle_stage != "active":
            raise RecipeError(
                f"the experiment {name} was deleted in MLflow",
                f"Restore it (mlflow experiments restore -x {found.experiment_id}) or name another one.",
            )
        return str(found.experiment_id)

    def _must(self, what: str, call: Callable[[], T]) -> T:
        """A call whose answer is needed now: waits a little for MLflow, then gives up."""
        # In the middle of a run there is something to lose.
        deadline = time.monotonic() + (_RUN_PATIENCE if self.run_id else _START_PATIENCE)
        while True:
            try:
                with self._outbox.whole():
                    return call()
            except (RecipeError, StageFailed):
                raise
            except Exception as error:
                if getattr(error, "error_code", "") == "UNAUTHENTICATED":
                    raise RecipeError(
                        f"MLflow at {self._outbox.place} asks for a password, or for another one",
                        "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
                    ) from error
                if not self._outbox.is_outage(error):
                    raise RecipeError(
                        f"MLflow at {self._outbox.place} refused {what}: {one_line(error)}",
                        "Check tracking.uri and the name.",
                    ) from error
                if self.uri.startswith("sqlite:"):
                    fault = disk_fault(error, self.workspace, f"recording {what} in MLflow")
                    if fault:  # waiting makes no room
                        raise fault from error
                if time.monotonic() > deadline:
                    raise StageFailed(
                        f"MLflow at {self._outbox.place} does not answer: {one_line(error)[:300]}",
                        "Start the server or correct tracking.uri, then resume the run.",
                    ) from error
                time.sleep(1)
