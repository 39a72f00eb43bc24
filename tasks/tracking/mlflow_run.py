"""One MLflow run: what MLflow does not have of it yet, and how that is sent.

Everything recorded goes into `Unsent` first and is sent from there. While MLflow is away it stays there, and
`tracker` saves it to disk. Sending is idempotent: what MLflow has already is not sent again.
"""

import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param

from tasks.store.facts import scalar_facts
from tasks.store.manifest import Manifest
from tasks.tracking.connection import Connection, one_line

log = logging.getLogger(__name__)
Point = tuple[str, float, int, int]  # metric, value, milliseconds since 1970, step

# MLflow's own limits (mlflow.utils.validation).
_PARAM_CHARS, TAG_CHARS, _KEY_CHARS, _DIGEST_CHARS = 6000, 8000, 250, 36
_BATCH = {"metrics": 1000, "params": 100}
STAGE_TAG = "dpo.stage"


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping with dotted keys; lists and scalars stay values."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat


def clean_key(key: str) -> str:
    """A name that MLflow accepts for a metric, parameter or tag."""
    key = re.sub(r"[^\w\-. :/]", "_", key, flags=re.ASCII)
    return re.sub(r"/+", "/", key).strip("/")[:_KEY_CHARS] or "_"


def metric_keys(names: Iterable[str]) -> dict[str, str]:
    """A unique lower-case key for each name, of characters that MLflow accepts in metric names."""
    keys: dict[str, str] = {}
    for name in names:
        key = clean_key(name.lower())
        numbered = (key if number == 1 else f"{key}-{number}" for number in count(1))
        keys[name] = next(free for free in numbered if free not in keys.values())
    return keys


def now_ms() -> int:
    """Milliseconds since 1970: MLflow's clock."""
    return int(time.time() * 1000)


def cut(value: Any, limit: int) -> str:
    """A value as text of at most `limit` characters."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= limit else text[: limit - 1] + "…"


@dataclass
class Unsent:
    """What MLflow does not have yet of a run, in JSON types."""

    experiment: str = ""
    parent: str = ""
    """MLflow's id of the parent run; empty for a parent."""
    stage: str = ""
    run_id: str | None = None
    """None until a child run exists in MLflow."""
    start_ms: int = 0
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    points: list[Point] = field(default_factory=list)
    datasets: list[tuple[dict[str, str], str]] = field(default_factory=list)
    """Fields of an MLflow data set, and its context."""
    files: list[tuple[str, str | None]] = field(default_factory=list)
    """Path of a file or folder, and its folder in the run's artifacts."""
    end: tuple[str, int] | None = None
    """Final status, and its time in milliseconds."""


class TrackedRun:
    """A run in MLflow. Nothing here raises because of MLflow.

    Args:
        keep_file: copies a file that could not be uploaded, because its stage may remove it; returns the
            copy's path.
    """

    def __init__(
        self, connection: Connection, unsent: Unsent, keep_file: Callable[[Path], Path] = lambda path: path
    ) -> None:
        self._connection, self.unsent, self._keep_file = connection, unsent, keep_file
        self._sent: set[tuple[str, int, float]] = set()
        """The points that MLflow has, see `_identity`."""
        self._refused = False
        """Whether MLflow refused to create the run, so that nothing of it can be sent."""

    @property
    def run_id(self) -> str | None:
        """MLflow's id; None while a child run does not exist there."""
        return self.unsent.run_id

    @property
    def complete(self) -> bool:
        """Whether MLflow has everything that was recorded, or refused it for good."""
        own = self.unsent
        left = (own.params, own.tags, own.points, own.datasets, own.files, own.end)
        return self._refused or (bool(own.run_id) and not any(left))

    def params(self, values: Mapping[str, Any]) -> None:
        """Record parameters. Nested names are dotted, long values cut; a recorded value is never changed."""
        flat = flatten(values).items()
        self._add(self.unsent.params, {clean_key(key): cut(value, _PARAM_CHARS) for key, value in flat})

    def tag(self, key: str, value: object) -> None:
        """Set a tag of the run."""
        self.tags({key: value})

    def tags(self, values: Mapping[str, object]) -> None:
        """Set tags of the run."""
        self._add(self.unsent.tags, {clean_key(key): cut(v, TAG_CHARS) for key, v in values.items()})

    def artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Upload a small file, or a folder of them, below `folder` of the run's artifacts."""
        with self._connection.lock:
            if not self._add(self.unsent.files, [(str(path), folder)]):
                self.unsent.files[-1] = str(self._keep_file(Path(path))), folder

    def dataset(self, name: str, digest: str, rows: int | None, source: str, context: str) -> None:
        """Record a data set as an input of the run, without reading it.

        Args:
            digest: its content digest; MLflow keeps the first 36 characters.
            source: path or URI of the data.
            context: training, validation, evaluation or reference.
        """
        scheme = source.split("://", maxsplit=1)[0] if "://" in source else "file"
        kind = {"file": "local", "https": "http"}.get(scheme, scheme)
        facts = {
            "name": name[:500],
            "digest": digest[:_DIGEST_CHARS],
            "source_type": kind,
            "source": json.dumps({"url" if kind == "http" else "uri": source}),
            "profile": json.dumps({"num_rows": rows}),
        }
        self._add(self.unsent.datasets, [(facts, context)])

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Record numbers at a step: the first ones count, but at step 0 changed ones are added."""
        now = now_ms()
        self._add(self.unsent.points, [(clean_key(k), float(v), now, step) for k, v in values.items()])

    def end(self, status: str) -> None:
        """Set the run's final status, with the present time as its end."""
        self.unsent.end = status, now_ms()
        self.send()

    def _add(self, unsent: Any, values: Any) -> bool:
        with self._connection.lock:  # `send` in another thread empties the list after sending it
            unsent.update(values) if isinstance(unsent, dict) else unsent.extend(values)
            return self.send()

    # Sending ------------------------------------------------------------------------------------------------

    def send(self, *, force: bool = False) -> bool:
        """Send what MLflow does not have; True if nothing is left. False while MLflow is away."""
        with self._connection.lock:
            if self.run_id is None and not self._refused:
                answered = self._attempt("the run", self._open, force)
                if not answered:
                    return False
                self._refused = self.run_id is None
            if self._refused:
                return True
            unsent = self.unsent
            for values, send in (
                (unsent.params, self._send_params),
                (unsent.tags, self._send_tags),
                (unsent.points, self._send_points),
                (unsent.datasets, self._send_datasets),
            ):
                if values:
                    if not self._attempt(send.__name__.removeprefix("_send_"), send, force):
                        return False
                    values.clear()
            if unsent.end is not None:
                if not self._attempt("the end", self._send_end, force):
                    return False
                unsent.end = None
            # Last, because the artifact store may fail while the rest of MLflow answers.
            while unsent.files:
                if not self._attempt(f"the artifact {unsent.files[0][0]}", self._send_file, force):
                    return False
                del unsent.files[0]
            return True

    def _attempt(self, what: str, send: Callable[[], None], force: bool) -> bool:
        of = self.unsent.stage or "the parent run"
        return self._connection.attempt(f"{what} of {of}", send, force=force)

    def _open(self) -> None:
        """Find this stage's run below the parent, or create it."""
        own, client = self.unsent, self._connection.client
        query = f"tags.`mlflow.parentRunId` = '{own.parent}' and tags.`{STAGE_TAG}` = '{own.stage}'"
        order = ["attributes.start_time DESC"]
        runs = client.search_runs([own.experiment], query, max_results=1, order_by=order)
        if runs:
            run = runs[0]
            client.update_run(run.info.run_id, status="RUNNING")
            with suppress(Exception):  # the tag may not exist
                client.delete_tag(run.info.run_id, "dpo.error")
            self.read_points(run)
        else:
            tags = {"mlflow.parentRunId": own.parent, STAGE_TAG: own.stage}
            run = client.create_run(own.experiment, own.start_ms, tags, own.stage)
        own.run_id, own.start_ms = run.info.run_id, run.info.start_time

    def read_points(self, run: Any) -> None:
        """Read the points of a run that is reopened, so that they are not sent again."""
        for key in run.data.metrics:
            history = self._connection.client.get_metric_history(run.info.run_id, key)
            self._sent |= {_identity(key, point.step, point.value) for point in history}

    def _send_params(self) -> None:
        # MLflow refuses a whole batch if one value in it differs from the recorded one.
        known = self._connection.client.get_run(self.run_id).data.params
        self._log("params", [Param(key, v) for key, v in self.unsent.params.items() if key not in known])
        changed = sorted(key for key, v in self.unsent.params.items() if known.get(key, v) != v)
        if changed:
            of = self.unsent.stage or "the parent run"
            log.warning("MLflow keeps the first values of these params of %s: %s", of, ", ".join(changed))

    def _send_tags(self) -> None:
        # In a batch MLflow would repeat a refused tag for half a minute.
        for key, value in self.unsent.tags.items():
            self._connection.client.set_tag(self.run_id, key, value)

    def _send_points(self) -> None:
        new: dict[tuple[str, int, float], Metric] = {}
        for key, value, when, step in self.unsent.points:
            new.setdefault(_identity(key, step, value), Metric(key, value, when, step))
        for sent in new.keys() & self._sent:
            del new[sent]
        # MLflow stores a point that is sent twice once.
        self._log("metrics", list(new.values()))
        self._sent |= new.keys()

    def _send_datasets(self) -> None:
        inputs = [
            DatasetInput(Dataset(**facts), [InputTag("mlflow.data.context", context)])
            for facts, context in self.unsent.datasets
        ]
        self._connection.client.log_inputs(self.run_id, inputs)

    def _send_file(self) -> None:
        client, (path, folder) = self._connection.client, self.unsent.files[0]
        upload = client.log_artifacts if os.path.isdir(path) else client.log_artifact
        upload(self.run_id, path, folder)

    def _send_end(self) -> None:
        assert self.unsent.end is not None
        status, end = self.unsent.end
        # The clock may have been set back since the run began.
        self._connection.client.set_terminated(self.run_id, status, max(end, self.unsent.start_ms))

    def _log(self, kind: str, entries: list[Any]) -> None:
        for start in range(0, len(entries), _BATCH[kind]):
            batch = {kind: entries[start : start + _BATCH[kind]]}
            self._connection.client.log_batch(self.run_id, **batch)


class StageRun(TrackedRun):
    """The child run of one stage."""

    def metrics_from_jsonl(self, path: str | Path, offset: int = 0) -> int:
        """Record the complete lines that a trainer appended to its metrics file since `offset`.

        A line is a JSON object with `step` (integer), `time` (seconds since 1970, recommended) and numbers.
        Points that the run already has are not sent again, so that the file may be read from 0 again after a
        resume.

        Returns:
            The offset for the next call.
        """
        try:
            with open(path, "rb") as file:
                if offset > os.fstat(file.fileno()).st_size:  # a resume has started a new file
                    offset = 0
                file.seek(offset)
                block = file.read()
        except OSError:  # the trainer has not created the file yet
            return offset
        block = block[: block.rfind(b"\n") + 1]
        self._add(self.unsent.points, _points(block, self.unsent.start_ms))
        return offset + len(block)

    def record_artifact(self, artifact: Manifest) -> None:
        """Record the stage's artifact: its facts, digest and URI."""
        self.params({f"out.{name}": value for name, value in scalar_facts(artifact).items()})
        self.tags({"dpo.artifact_sha256": artifact.sha256, "dpo.artifact_uri": artifact.uri})

    def close(self, status: str, error: BaseException | None = None) -> None:
        """End the run: the error if it failed, and its status."""
        if error is not None:
            self.tag("dpo.error", one_line(error))
        self.end(status)


def _identity(key: str, step: int, value: float) -> tuple[str, int, float]:
    """What two points have in common of which MLflow is sent the first only.

    A trainer that continues from a checkpoint, or is restarted, repeats steps with other times and speeds.
    Step 0 is that of a stage's results, which a resumed run may change.
    """
    return key, step, 0.0 if step else value


def _points(block: bytes, start_ms: int) -> list[Point]:
    """The numbers in complete lines of a metrics file, as points of metrics."""
    points: list[Point] = []
    for line in block.splitlines():
        try:
            facts = json.loads(line)
            step = int(facts.pop("step"))
            moment = facts.pop("time", None)
            # A line without a time gets one derived from its step, so that every attempt sends the same.
            when = int(float(moment) * 1000) if moment is not None else start_ms + step
        except (ValueError, KeyError, TypeError, AttributeError):
            if line.strip():
                log.warning(
                    "ignored a line of the metrics file that is not an object with a step: %.80r", line
                )
            continue
        for key, value in facts.items():
            if isinstance(value, int | float):
                points.append((clean_key(key), float(value), when, step))
    return points
