"""MLflow tracking: one parent run an alignment, one child run a stage, and no stage lost to a server's nap.

Every write after the parent's start goes through an outbox: while MLflow does not answer, writes wait in
order and the caller goes on. Points of a metric carry the time of their own line, so that a batch sent twice
is stored once.
"""

import importlib.metadata
import json
import logging
import math
import os
import platform
import re
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeVar

import yaml
from pydantic import Field

from dpo_core.config import Config
from dpo_core.errors import RecipeError, StageFailed
from tasks.store import open_workspace

log = logging.getLogger(__name__)
T = TypeVar("T")
Point = tuple[str, float, int, int]  # metric, value, milliseconds since 1970, step

# MLflow's own limits (mlflow.utils.validation).
_PARAM_CHARS, _TAG_CHARS, _KEY_CHARS, _DIGEST_CHARS = 6000, 8000, 250, 36
_METRICS_A_BATCH, _PARAMS_A_BATCH = 1000, 100
_HEADLINE_PARAMS = 60
# The UI slows down with long curves. The rest up to 2000 is room for the last points of interrupted runs.
_BUCKETS = 1900
_READ_BYTES = 4 << 20
_PATIENCE = {"FINISHED": 30.0, "FAILED": 30.0, "KILLED": 5.0}  # seconds to wait for MLflow when a run ends
_START_PATIENCE = 30.0
_PAUSE = (0.5, 15.0)  # first and longest pause between two attempts, seconds
_REFUSALS = {
    "INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS", "INVALID_STATE",
    "BAD_REQUEST", "PERMISSION_DENIED", "UNAUTHENTICATED", "ENDPOINT_NOT_FOUND", "NOT_IMPLEMENTED",
}  # fmt: skip


class TrackingConfig(Config):
    """Where the runs are recorded."""

    uri: str | None = None
    """MLflow tracking URI; else $MLFLOW_TRACKING_URI, else `mlflow.db` (SQLite) in the workspace."""
    experiment: str | None = None
    """Experiment; `dpo/<recipe name>` if not given."""
    tags: dict[str, str] = Field(default_factory=dict)
    """Further tags of the parent run."""


def resolve_uri(config: TrackingConfig, workspace: Path) -> str:
    """The tracking URI, absolute whatever the working directory is later.

    Raises:
        RecipeError: it names MLflow's file store, which MLflow dropped in 3.13.
    """
    uri = config.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{workspace / 'mlflow.db'}"
    if ("://" not in uri and uri != "databricks") or uri.startswith("file:"):
        raise RecipeError(
            f"tracking URI {uri} is a folder, which MLflow no longer writes to",
            "Use sqlite:///<absolute path>.db, the http:// URL of an MLflow server, or leave it out.",
        )
    if uri.startswith("sqlite:///"):
        uri = f"sqlite:///{Path(uri.removeprefix('sqlite:///')).absolute()}"
    return uri


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping with dotted keys; lists and scalars stay values."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat


def _clean(key: str) -> str:
    """A name that MLflow accepts for a metric, parameter or tag."""
    key = re.sub(r"[^\w\-. :/]", "_", key, flags=re.ASCII)
    return re.sub(r"/+", "/", key).strip("/")[:_KEY_CHARS] or "_"


def _cut(value: Any, limit: int) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return re.sub(r"//[^/@\s]+@", "//***@", text)  # no passwords of a database in logs or tags


class _Outbox:
    """Writes to MLflow in their order; those that cannot go out now wait for the next call."""

    def __init__(self, place: str, alive: Callable[[], object]) -> None:
        self.place, self._alive = re.sub(r"//[^/@\s]+@", "//***@", place), alive
        self.queue: deque[tuple[str, Callable[[], None]]] = deque()
        self.delay_s = 0.0
        self._lock = threading.RLock()
        self._down_since: float | None = None
        self._next_try, self._pause, self._bad_tries = 0.0, _PAUSE[0], 0

    def put(self, what: str, send: Callable[[], None]) -> None:
        with self._lock:
            self.queue.append((what, send))
            self.drain()

    def drain(self, patience: float = 0.0) -> bool:
        """Send what waits; True when nothing is left. Waits for MLflow up to `patience` seconds."""
        deadline = time.monotonic() + patience
        with self._lock:
            while self.queue:
                if self.attempt(*self.queue[0], force=patience > 0):
                    self.queue.popleft()
                elif time.monotonic() >= deadline:
                    return False
                else:
                    time.sleep(min(1.0, self._pause, max(0.0, deadline - time.monotonic())))
            return True

    def attempt(self, what: str, send: Callable[[], None], *, force: bool = False) -> bool:
        """Try one write. True: it is done with, sent or refused for good; False: MLflow is away."""
        with self._lock:
            if time.monotonic() < self._next_try and not force:
                return False
            try:
                send()
            except Exception as error:
                if self.is_outage(error):
                    self._went_down(error)
                    return False
                log.warning("MLflow at %s refused %s: %s", self.place, what, _one_line(error))
            self._bad_tries = 0
            self._came_back()
            return True

    def is_outage(self, error: Exception) -> bool:
        """Whether a failure is the server's absence rather than the write's own fault."""
        from mlflow.exceptions import MlflowException
        from requests import RequestException
        from sqlalchemy.exc import OperationalError

        if not isinstance(error, MlflowException | RequestException | OperationalError):
            return False
        if getattr(error, "error_code", "") in _REFUSALS:
            return False
        try:
            self._alive()
        except Exception:
            return True
        # The server answers others: a passing fault, or one write that it can never take.
        self._bad_tries += 1
        return self._bad_tries < 4

    def _went_down(self, error: Exception) -> None:
        if self._down_since is None:
            self._down_since = time.monotonic()
            log.warning(
                "MLflow at %s does not answer (%s); the run goes on, metrics are kept and sent later",
                self.place,
                _one_line(error)[:300],
            )
        self._next_try = time.monotonic() + self._pause
        self._pause = min(2 * self._pause, _PAUSE[1])

    def _came_back(self) -> None:
        self._next_try, self._pause = 0.0, _PAUSE[0]
        if self._down_since is not None:
            away = time.monotonic() - self._down_since
            self.delay_s, self._down_since = self.delay_s + away, None
            log.info("MLflow at %s answers again after %.0f s; sending what waited", self.place, away)


class _Run:
    """Writes shared by parent and child runs. The run may not exist yet: `run_id` is set when it does."""

    def __init__(self, client: Any, outbox: _Outbox, run_id: str | None = None) -> None:
        self._client, self._outbox, self.run_id = client, outbox, run_id

    def params(self, values: Mapping[str, Any]) -> None:
        """Record parameters: nested mappings with dotted names, long values cut. A recorded one stays."""
        from mlflow.entities import Param

        flat = {_clean(key): _cut(value, _PARAM_CHARS) for key, value in flatten(values).items()}

        def send() -> None:
            there = self._client.get_run(self.run_id).data.params
            changed = [key for key, value in flat.items() if there.get(key, value) != value]
            if changed:
                log.warning("MLflow keeps the first value of %s", ", ".join(changed))
            new = [Param(key, value) for key, value in flat.items() if key not in there]
            for start in range(0, len(new), _PARAMS_A_BATCH):
                self._client.log_batch(self.run_id, params=new[start : start + _PARAMS_A_BATCH])

        self._outbox.put("parameters", send)

    def tag(self, key: str, value: object) -> None:
        """Set a tag of the run."""
        text = _cut(value, _TAG_CHARS)
        self._outbox.put(f"tag {key}", lambda: self._client.set_tag(self.run_id, _clean(key), text))

    def artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Upload a small file, or a folder of them, below `folder` of the run's artifacts."""
        path = Path(path)
        upload = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
        self._outbox.put(f"artifact {path}", lambda: upload(self.run_id, str(path), folder))

    def text(self, text: str, name: str) -> None:
        """Store a text as an artifact with this relative name."""
        self._outbox.put(f"artifact {name}", lambda: self._client.log_text(self.run_id, text, name))

    def dataset(self, name: str, digest: str, rows: int | None, source: str, context: str) -> None:
        """Record a data set as an input of the run, without reading it.

        Args:
            digest: its content digest; MLflow keeps the first 36 characters.
            source: path or URI of the data.
            context: training, validation, evaluation or reference.
        """
        from mlflow.entities import Dataset, DatasetInput, InputTag

        scheme = source.split("://", maxsplit=1)[0] if "://" in source else "file"
        kind = {"file": "local", "https": "http"}.get(scheme, scheme)
        entity = Dataset(
            name=name[:500],
            digest=digest[:_DIGEST_CHARS],
            source_type=kind,
            source=json.dumps({"url" if kind == "http" else "uri": source}),
            profile=json.dumps({"num_rows": rows}),
        )
        given = DatasetInput(entity, [InputTag("mlflow.data.context", context)])
        self._outbox.put(f"data set {name}", lambda: self._client.log_inputs(self.run_id, [given]))


class StageRun(_Run):
    """The child run of one stage. No method raises for MLflow's sake."""

    def __init__(self, client: Any, outbox: _Outbox, stage: str, total_steps: int | None) -> None:
        super().__init__(client, outbox)
        self.stage, self._total_steps = stage, total_steps
        self._finished_ms: int | None = None  # end of a run that was finished before and has nothing new
        self._start_ms = 0
        self._sent: dict[str, dict[int, float]] | None = None
        self._held: dict[str, Point] = {}
        self._streams: dict[Path, tuple[IO[bytes], int]] = {}

    def open(self, experiment: str, parent: str, tags: dict[str, str]) -> None:
        """Find this stage's run below the parent, or create it. Safe to repeat."""
        query = f"tags.`mlflow.parentRunId` = '{parent}' and tags.`dpo.stage` = '{self.stage}'"
        order = ["attributes.start_time DESC"]
        found = self._client.search_runs([experiment], query, max_results=1, order_by=order)
        if found:
            run = found[0]
            if run.info.status == "FINISHED":
                self._finished_ms = run.info.end_time
            else:
                self._client.update_run(run.info.run_id, status="RUNNING")
                with suppress(Exception):  # there need not be one
                    self._client.delete_tag(run.info.run_id, "dpo.error")
        else:
            own = {"mlflow.parentRunId": parent, "dpo.stage": self.stage}
            run = self._client.create_run(experiment, tags=tags | own, run_name=self.stage)
            self._sent = {}
        self.run_id, self._start_ms = run.info.run_id, run.info.start_time

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Record numbers at a step. The same numbers at the same step are recorded once."""
        now = int(time.time() * 1000)
        points = [(_clean(key), float(value), now, step) for key, value in values.items()]

        def send() -> None:
            known = self._history()
            self._log([p for p in points if not _same(known.get(p[0], {}).get(p[3]), p[1])])

        self._outbox.put(f"{len(points)} metrics", send)

    def metrics_from_jsonl(self, path: str | Path, offset: int = 0) -> int:
        """Send the complete lines that a trainer appended to its metrics file since `offset`.

        A line is a JSON object with `step` (integer), `time` (seconds since 1970, recommended) and numbers.
        At most 2000 points a metric are sent, evenly over `total_steps` where the stage gave it, else ever
        wider apart; the last one always is. Steps that the run already has are left out, so that after a
        resume the file may be read from 0 again. What could not be sent is tried again at the stage's end.

        Returns:
            The offset for the next call: the old one, or less far, while MLflow is away.
        """
        path = Path(path)
        try:
            file = self._follow(path)
        except OSError:  # the trainer has not written yet
            return offset
        size = os.fstat(file.fileno()).st_size
        self._streams[path] = (file, offset if offset <= size else 0)  # shorter: begun anew by a resume
        if self._outbox.drain():
            self._outbox.attempt(f"metrics of {path}", lambda: self._send_lines(path))
        return self._streams[path][1]

    def close(self, status: str, error: BaseException | None = None) -> None:
        """End the run: the rest of its metrics, the reason of a failure, the status."""
        for path in self._streams:
            self._outbox.put(f"metrics of {path}", lambda path=path: self._send_lines(path))  # type: ignore[misc]
        self._outbox.put("last metrics", lambda: self._log(self._last_points()))
        if error is not None:
            self.tag("dpo.error", _one_line(error))
        self._outbox.put("status", lambda: self._end(status))
        self._outbox.drain(_PATIENCE[status])

    def _end(self, status: str) -> None:
        end = self._finished_ms if status == "FINISHED" else None
        self._client.set_terminated(self.run_id, status, end)
        for file, _ in self._streams.values():
            file.close()

    def _follow(self, path: Path) -> IO[bytes]:
        """The open file. It stays open, so that lines are not lost when the stage commits its folder."""
        if path in self._streams:
            file = self._streams[path][0]
            if not path.exists() or os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
            file.close()
        return open(path, "rb")

    def _send_lines(self, path: Path) -> None:
        while True:
            file, offset = self._streams[path]
            file.seek(offset)
            block = file.read(_READ_BYTES)
            block = block[: block.rfind(b"\n") + 1]
            if not block:
                return
            held = dict(self._held)
            points = self._thin(_points(block, self._start_ms), held)
            self._log(points)
            self._held, self._streams[path] = held, (file, offset + len(block))

    def _thin(self, points: list[Point], held: dict[str, Point]) -> list[Point]:
        """The points to send: the first of each bucket of steps. `held` gets the last one left out."""
        last = {key: max(steps) for key, steps in self._history().items() if steps}
        chosen = []
        for point in points:
            key, _, _, step = point
            if key in last and step <= last[key]:
                continue
            if key in last and self._bucket(step) == self._bucket(last[key]):
                held[key] = point
                continue
            held.pop(key, None)
            last[key] = step
            chosen.append(point)
        return chosen

    def _bucket(self, step: int) -> int:
        if self._total_steps:
            return min(_BUCKETS, step * _BUCKETS // max(self._total_steps + 1, _BUCKETS))
        # Length unknown: every step up to 1000, then 75 points for each doubling; full at 4 million steps.
        return step if step < 1000 else min(_BUCKETS, 1000 + int(75 * math.log2(step / 1000)))

    def _last_points(self) -> list[Point]:
        known = self._history()
        return [point for key, point in self._held.items() if point[3] > max(known.get(key, {-1: 0.0}))]

    def _history(self) -> dict[str, dict[int, float]]:
        """What the run holds: metric to step to value. Read back once for a run that was opened again."""
        if self._sent is None:
            self._sent = {
                key: {m.step: m.value for m in self._client.get_metric_history(self.run_id, key)}
                for key in self._client.get_run(self.run_id).data.metrics
            }
        return self._sent

    def _log(self, points: list[Point]) -> None:
        from mlflow.entities import Metric

        for start in range(0, len(points), _METRICS_A_BATCH):
            batch = points[start : start + _METRICS_A_BATCH]
            self._client.log_batch(self.run_id, metrics=[Metric(*point) for point in batch])
            self._finished_ms = None
            for key, value, _, step in batch:
                self._history().setdefault(key, {})[step] = value


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
        self.experiment_id = ""

    def start_parent(
        self,
        name: str,
        *,
        recipe: Mapping[str, Any],
        run_id: str | None = None,
        description: str = "",
        tags: Mapping[str, str] | None = None,
    ) -> str:
        """Open the run of a whole alignment, or go on with `run_id`; returns its id.

        Args:
            recipe: the resolved recipe in JSON types; stored as `config/recipe.yaml`, its outermost values
                as parameters.
            description: Markdown for the run's page.

        Raises:
            StageFailed: MLflow does not answer.
            RecipeError: there is no run `run_id`, or the database cannot be used.
        """
        self._connect()
        experiment = self._config.experiment or f"dpo/{recipe.get('name') or name}"
        every = {**self._config.tags, **(tags or {}), **source_tags()}
        if description:
            every["mlflow.note.content"] = description
        every = {_clean(key): _cut(value, _TAG_CHARS) for key, value in every.items()}

        def open_run() -> tuple[str, str]:
            if run_id:
                info = self._client.get_run(run_id).info
                self._client.update_run(run_id, status="RUNNING")
                for key, value in every.items():
                    self._client.set_tag(run_id, key, value)
            else:
                info = self._client.create_run(self._experiment(experiment), tags=every, run_name=name).info
            return info.run_id, info.experiment_id

        what = f"run {run_id}" if run_id else f"experiment {experiment}"
        self.run_id, self.experiment_id = self._must(what, open_run)
        self.parent = _Run(self._client, self._outbox, self.run_id)
        self.parent.text(
            yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True), "config/recipe.yaml"
        )
        self.parent.text(json.dumps(environment(), indent=1), "environment.json")
        given = {key: value for key, value in flatten(recipe).items() if value is not None}
        headline = sorted(given, key=lambda key: key.count("."))[:_HEADLINE_PARAMS]
        self.parent.params({key: given[key] for key in headline})
        return self.run_id

    def finish_parent(self, status: str = "FINISHED") -> None:
        """End the parent with FINISHED, FAILED or KILLED. Warns if MLflow never took some of the writes."""
        self._outbox.put("status", lambda: self._client.set_terminated(self.run_id, status))
        if self._outbox.drain(_PATIENCE[status]) and self._outbox.delay_s >= 1:
            self.parent.tag("dpo.tracking_delay_s", round(self._outbox.delay_s))
        if self._outbox.queue:
            lost = sorted({what for what, _ in self._outbox.queue})
            log.warning(
                "MLflow at %s did not take %d writes (%s); the artifacts are whole, resume to send metrics",
                self._outbox.place,
                len(self._outbox.queue),
                _cut(", ".join(lost), 500),
            )

    @contextmanager
    def child(
        self, stage: str, *, total_steps: int | None = None, tags: Mapping[str, str] | None = None
    ) -> Iterator[StageRun]:
        """The stage's own run below the parent; on a resume the one that it already has.

        Ends FINISHED; FAILED with the message in the tag `dpo.error` when the stage raises; KILLED when it is
        interrupted. What the stage raises goes on unchanged.
        """
        run = StageRun(self._client, self._outbox, stage, total_steps)
        own = {key: _cut(value, _TAG_CHARS) for key, value in (tags or {}).items()}
        self._outbox.put(f"run of {stage}", lambda: run.open(self.experiment_id, self.run_id, own))
        try:
            yield run
        except BaseException as error:
            # Interrupts and the signals that orchestrators raise are no Exception.
            run.close("FAILED" if isinstance(error, Exception) else "KILLED", error)
            raise
        run.close("FINISHED")

    def register_model(
        self,
        name: str,
        model_uri_folder: str,
        parent_run: str | None = None,
        alias: str = "challenger",
        tags: Mapping[str, str] | None = None,
    ) -> str:
        """Register weights by reference, without uploading them; returns the version.

        The version's tag `dpo.weights_uri` holds the URI. Its source does so too, except on a server, which
        takes no local paths: there the source is the logged model. The same weights of the same run are
        registered once.

        Raises:
            StageFailed: MLflow does not answer, or refuses.
        """
        self._connect()
        run_id = parent_run or self.run_id
        uri = model_uri_folder if "://" in model_uri_folder else Path(model_uri_folder).absolute().as_uri()
        every = {key: _cut(value, _TAG_CHARS) for key, value in (tags or {}).items()} | {
            "dpo.weights_uri": uri
        }

        def register() -> str:
            _unless_there(lambda: self._client.create_registered_model(name))
            for found in self._client.search_model_versions(f"name = '{name}'"):
                if found.run_id == run_id and found.tags.get("dpo.weights_uri") == uri:
                    version = found.version
                    break
            else:
                version = self._new_version(name, uri, run_id, every)
            self._client.set_registered_model_alias(name, alias, version)
            return str(version)

        return self._must(f"model {name}", register)

    def _new_version(self, name: str, uri: str, run_id: str, tags: dict[str, str]) -> str:
        import mlflow
        from mlflow.exceptions import MlflowException

        mlflow.set_tracking_uri(self.uri)  # create_external_model knows the global address only
        model = mlflow.create_external_model(
            name=re.sub(r"[/:.%\"']", "-", name),
            source_run_id=run_id,
            tags=tags,
            model_type="dpo-policy",
            experiment_id=self._client.get_run(run_id).info.experiment_id,
        )
        facts = {"run_id": run_id, "tags": tags, "model_id": model.model_id}
        try:
            return str(self._client.create_model_version(name, uri, **facts).version)
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            return str(self._client.create_model_version(name, f"models:/{model.model_id}", **facts).version)

    def _connect(self) -> None:
        if self._client is not None:
            return
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("DO_NOT_TRACK", "1")
        # MLflow's own seven retries hold a call for minutes; the outbox does the waiting.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        for noisy in ("alembic", "mlflow.store.db.utils"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        from mlflow import MlflowClient

        if self.uri.startswith("sqlite:"):
            folder = Path(self.uri.removeprefix("sqlite:///")).parent
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise RecipeError(
                    f"the tracking database's folder {folder} cannot be made: {error.strerror}",
                    "Make it writable, or set tracking.uri.",
                ) from error
        client = MlflowClient(self.uri, os.environ.get("MLFLOW_REGISTRY_URI") or self.uri)
        self._outbox = _Outbox(self.uri, lambda: client.search_experiments(max_results=1))
        self._client = client

    def _experiment(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is None:
            # Without a server MLflow would put artifacts below the working directory.
            local = "://" in self.uri and not self.uri.startswith("http")
            location = (self.workspace / "mlartifacts").as_uri() if local else None
            _unless_there(lambda: self._client.create_experiment(name, artifact_location=location))
            found = self._client.get_experiment_by_name(name)
        if found.lifecycle_stage != "active":
            raise RecipeError(
                f"the experiment {name} was deleted in MLflow",
                f"Restore it (mlflow experiments restore -x {found.experiment_id}) or name another one.",
            )
        return str(found.experiment_id)

    def _must(self, what: str, call: Callable[[], T]) -> T:
        """A call whose answer is needed now: waits a little for MLflow, then gives up."""
        deadline = time.monotonic() + _START_PATIENCE
        while True:
            try:
                return call()
            except (RecipeError, StageFailed):
                raise
            except Exception as error:
                if not self._outbox.is_outage(error):
                    raise RecipeError(
                        f"MLflow at {self._outbox.place} refused {what}: {_one_line(error)}",
                        "Check tracking.uri and the name.",
                    ) from error
                if time.monotonic() > deadline:
                    raise StageFailed(
                        f"MLflow at {self._outbox.place} does not answer: {_one_line(error)[:300]}",
                        "Start the server or correct tracking.uri, then resume the run.",
                    ) from error
                time.sleep(1)


def _unless_there(create: Callable[[], object]) -> None:
    """Create something that another process may have created in the meantime."""
    from mlflow.exceptions import MlflowException

    try:
        create()
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _same(first: float | None, second: float) -> bool:
    return first is not None and (first == second or (math.isnan(first) and math.isnan(second)))


def _points(block: bytes, start_ms: int) -> list[Point]:
    """The numbers in complete lines of a metrics file, as points of metrics."""
    points: list[Point] = []
    for line in block.splitlines():
        try:
            facts = json.loads(line)
            step = int(facts.pop("step"))
            moment = facts.pop("time", None)
            # A line without time gets one made of its step: the same at each attempt.
            when = int(float(moment) * 1000) if moment is not None else start_ms + step
        except (ValueError, KeyError, TypeError, AttributeError):
            if line.strip():
                log.warning("a line of the metrics file is not an object with a step: %.80r", line)
            continue
        for key, value in facts.items():
            if isinstance(value, int | float):
                points.append((_clean(key), float(value), when, step))
    return points


def source_tags() -> dict[str, str]:
    """Which code ran: commit, branch and dirty flag from git, else the commit in $DPO_GIT_COMMIT."""
    here = Path(__file__)

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), "--no-optional-locks", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    tags = {"mlflow.source.name": "dpo", "mlflow.source.type": "LOCAL"}
    try:
        # An installed package may lie in a folder that belongs to some other repository.
        git("ls-files", "--error-unmatch", here.name)
        tags["mlflow.source.git.commit"] = git("rev-parse", "HEAD")
        tags["mlflow.source.git.branch"] = git("rev-parse", "--abbrev-ref", "HEAD")
        tags["mlflow.source.git.dirty"] = str(bool(git("status", "--porcelain", "-uno"))).lower()
    except (OSError, subprocess.SubprocessError):
        if commit := os.environ.get("DPO_GIT_COMMIT"):
            tags["mlflow.source.git.commit"] = commit
    return tags


def environment() -> dict[str, Any]:
    """Python, packages and machine; PyTorch is asked only where it is loaded anyway."""
    torch = sys.modules.get("torch")
    packages = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads() if torch else None,
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "packages": dict(sorted(packages.items(), key=lambda item: str(item[0]).lower())),
    }
