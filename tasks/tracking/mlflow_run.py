"""Writes to one MLflow run: parameters, tags, artifacts, data sets, metrics, and a trainer's curves.

Each metric point carries the time of its line in the metrics file, so that a batch sent twice is stored once.
"""

import json
import logging
import math
import os
import re
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import IO, Any

from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param

from tasks.store.facts import scalar_facts
from tasks.store.manifest import Manifest
from tasks.tracking.outbox import PATIENCE, STAGE_PATIENCE, Outbox, Write, one_line

log = logging.getLogger(__name__)
Point = tuple[str, float, int, int]  # metric, value, milliseconds since 1970, step

# MLflow's own limits (mlflow.utils.validation).
_PARAM_CHARS, TAG_CHARS, _KEY_CHARS, _DIGEST_CHARS = 6000, 8000, 250, 36
_METRICS_A_BATCH, _PARAMS_A_BATCH = 1000, 100
# The UI slows down with long curves. The rest up to 2000 is room for the last points of interrupted runs.
_BUCKETS = 1900
_READ_BYTES = 4 << 20


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


class TrackedRun:
    """Writes shared by parent and child runs. `run_id` is None until the run exists in MLflow.

    Every write is queued as the name and arguments of a `send_` method; see `Outbox`.
    """

    stage = ""  # of a parent

    def __init__(self, client: Any, outbox: Outbox, run_id: str | None = None, start_ms: int = 0) -> None:
        self._client, self._outbox, self.run_id, self._start_ms = client, outbox, run_id, start_ms
        self._sent: dict[str, dict[int, float]] | None = None  # the run's points; None: not read yet

    def params(self, values: Mapping[str, Any]) -> None:
        """Record parameters. Nested names are dotted, long values cut; a recorded value is never changed."""
        flat = {clean_key(key): cut(value, _PARAM_CHARS) for key, value in flatten(values).items()}
        self._put("parameters", "send_params", flat)

    def send_params(self, flat: dict[str, str]) -> None:
        recorded = self._client.get_run(self.run_id).data.params
        changed = [key for key, value in flat.items() if recorded.get(key, value) != value]
        if changed:
            log.warning("MLflow keeps the first value of %s", ", ".join(changed))
        new = [Param(key, value) for key, value in flat.items() if key not in recorded]
        for start in range(0, len(new), _PARAMS_A_BATCH):
            self._client.log_batch(self.run_id, params=new[start : start + _PARAMS_A_BATCH])

    def tag(self, key: str, value: object) -> None:
        """Set a tag of the run."""
        self._put(f"tag {key}", "send_tag", clean_key(key), cut(value, TAG_CHARS))

    def send_tag(self, key: str, text: str) -> None:
        self._client.set_tag(self.run_id, key, text)

    def artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Upload a small file, or a folder of them, below `folder` of the run's artifacts."""
        write = Write(f"artifact {path}", self, "send_artifact", [str(path), folder])
        if not self._outbox.put(write):
            write.args = [str(self._outbox.keep_file(Path(path))), folder]

    def send_artifact(self, path: str, folder: str | None) -> None:
        upload = self._client.log_artifacts if os.path.isdir(path) else self._client.log_artifact
        upload(self.run_id, path, folder)

    def text(self, text: str, name: str) -> None:
        """Store a text as an artifact with this relative name."""
        self._put(f"artifact {name}", "send_text", text, name)

    def send_text(self, text: str, name: str) -> None:
        self._client.log_text(self.run_id, text, name)

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
        self._put(f"data set {name}", "send_dataset", facts, context)

    def send_dataset(self, facts: dict[str, str], context: str) -> None:
        dataset = DatasetInput(Dataset(**facts), [InputTag("mlflow.data.context", context)])
        self._client.log_inputs(self.run_id, [dataset])

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Record numbers at a step. The same numbers at the same step are recorded once."""
        now = now_ms()
        points = [[clean_key(key), float(value), now, step] for key, value in values.items()]
        self._put(f"{len(points)} metrics", "send_points", points)

    def send_points(self, points: list[list[Any]]) -> None:
        known = self._history()
        new: list[Point] = [(key, value, when, step) for key, value, when, step in points]
        self._log([p for p in new if not _same(known.get(p[0], {}).get(p[3]), p[1])])

    def end(self, status: str) -> None:
        """Set the run's final status, with the present time as its end."""
        self._put("status", "send_end", status, now_ms())

    def send_end(self, status: str, end: int) -> None:
        # The clock may have been set back since the run began.
        self._client.set_terminated(self.run_id, status, max(end, self._start_ms))

    def send_description(self, name: str, version: str, text: str) -> None:
        self._client.update_model_version(name, version, text)

    def _put(self, what: str, call: str, *args: Any) -> None:
        self._outbox.put(Write(what, self, call, list(args)))

    def _history(self) -> dict[str, dict[int, float]]:
        """The run's points in MLflow: metric to step to value. Read once when a run is reopened."""
        if self._sent is None:
            self._sent = {
                key: {m.step: m.value for m in self._client.get_metric_history(self.run_id, key)}
                for key in self._client.get_run(self.run_id).data.metrics
            }
        return self._sent

    def _log(self, points: list[Point]) -> None:
        for start in range(0, len(points), _METRICS_A_BATCH):
            batch = points[start : start + _METRICS_A_BATCH]
            self._client.log_batch(self.run_id, metrics=[Metric(*point) for point in batch])
            for key, value, _, step in batch:
                self._history().setdefault(key, {})[step] = value


class StageRun(TrackedRun):
    """The child run of one stage. No method raises because of MLflow."""

    def __init__(self, client: Any, outbox: Outbox, stage: str, total_steps: int | None) -> None:
        super().__init__(client, outbox, start_ms=now_ms())  # the start time, even if MLflow is down now
        self.stage, self._total_steps = stage, total_steps
        self._finished_ms: int | None = None  # end of a run that had finished and got no new points
        self._held: dict[str, Point] = {}
        self._streams: dict[Path, tuple[IO[bytes], int]] = {}

    def open(self, experiment: str, parent: str, tags: dict[str, str]) -> None:
        """Find this stage's run below the parent, or create it."""
        self._put(f"run of {self.stage}", "send_open", experiment, parent, tags, self._start_ms)

    def send_open(self, experiment: str, parent: str, tags: dict[str, str], start_ms: int) -> None:
        """Safe to repeat."""
        query = f"tags.`mlflow.parentRunId` = '{parent}' and tags.`dpo.stage` = '{self.stage}'"
        order = ["attributes.start_time DESC"]
        runs = self._client.search_runs([experiment], query, max_results=1, order_by=order)
        if runs:
            run = runs[0]
            if run.info.status == "FINISHED":
                self._finished_ms = run.info.end_time
            else:
                self._client.update_run(run.info.run_id, status="RUNNING")
                with suppress(Exception):  # the tag may not exist
                    self._client.delete_tag(run.info.run_id, "dpo.error")
        else:
            own = {"mlflow.parentRunId": parent, "dpo.stage": self.stage}
            run = self._client.create_run(experiment, start_ms, tags | own, self.stage)
            self._sent = {}
        self.run_id, self._start_ms = run.info.run_id, run.info.start_time

    def metrics_from_jsonl(self, path: str | Path, offset: int = 0) -> int:
        """Send the complete lines that a trainer appended to its metrics file since `offset`.

        A line is a JSON object with `step` (integer), `time` (seconds since 1970, recommended) and numbers.
        At most 2000 points per metric are sent, always including the last: evenly spaced if `total_steps` is
        known, else with growing distance. Steps that the run already has are skipped, so that the file may be
        read from 0 again after a resume. Points that could not be sent are sent at the stage's end.

        Returns:
            The offset for the next call. It does not advance while MLflow is unreachable.
        """
        path = Path(path)
        try:
            file = self._follow(path)
        except OSError:  # the trainer has not created the file yet
            return offset
        size = os.fstat(file.fileno()).st_size
        self._streams[path] = (file, offset if offset <= size else 0)  # a resume may have started a new file
        if self._outbox.drain():
            self._outbox.attempt(f"metrics of {path}", lambda: self.send_curve(str(path)))
        return self._streams[path][1]

    def record_artifact(self, artifact: Manifest) -> None:
        """Record the stage's artifact: its facts, digest and URI."""
        self.params({f"out.{name}": value for name, value in scalar_facts(artifact).items()})
        self.tag("dpo.artifact_sha256", artifact.sha256)
        self.tag("dpo.artifact_uri", artifact.uri)

    def close(self, status: str, error: BaseException | None = None) -> None:
        """End the run: send its remaining metrics, the error if it failed, and its status."""
        curves = [Write(f"metrics of {p}", self, "send_curve", [str(p)]) for p in self._streams]
        for curve in curves:
            self._outbox.put(curve)
        self._put("last metrics", "send_last")
        if error is not None:
            self.tag("dpo.error", one_line(error))
        self.end(status)
        if not self._outbox.drain(min(STAGE_PATIENCE, PATIENCE[status])):
            self._keep_curves(curves)

    def _keep_curves(self, curves: list[Write]) -> None:
        """Copy unsent metrics files, because the stage's folder will be gone when MLflow answers again."""
        for curve in curves:
            path = Path(curve.args[0])
            if curve in self._outbox.queue:
                copy = self._outbox.keep_file(path, self._streams[path][0])
                self._streams[copy] = self._streams.pop(path)
                curve.args = [str(copy)]

    def send_end(self, status: str, end: int) -> None:
        if status == "FINISHED" and self._finished_ms is not None:
            end = self._finished_ms
        super().send_end(status, end)
        for file, _ in self._streams.values():
            file.close()

    def _follow(self, path: Path) -> IO[bytes]:
        """The open metrics file. It stays open, so that no line is lost when the stage's folder is moved."""
        if path in self._streams:
            file = self._streams[path][0]
            if not path.exists() or os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
            file.close()
        return open(path, "rb")

    def send_curve(self, name: str) -> None:
        """Send the lines of a metrics file that were not sent yet."""
        path = Path(name)
        if path not in self._streams:  # copied by an earlier process
            self._streams[path] = (path.open("rb"), 0)
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

    def send_last(self) -> None:
        """Send the last points, which thinning may have left out."""
        known = self._history()
        self._log([p for key, p in self._held.items() if p[3] > max(known.get(key, {-1: 0.0}))])

    def _log(self, points: list[Point]) -> None:
        super()._log(points)
        if points:
            self._finished_ms = None


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
