"""Writing to one MLflow run: parameters, tags, artifacts, data sets, numbers, and a trainer's curves.

Points of a metric carry the time of their own line, so that a batch sent twice is stored once.
"""

import json
import logging
import math
import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from tasks.manifest import Manifest
from tasks.tracking_outbox import PATIENCE, Outbox, one_line

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


def now_ms() -> int:
    """Milliseconds since 1970: MLflow's clock."""
    return int(time.time() * 1000)


def cut(value: Any, limit: int) -> str:
    """A value as text of at most `limit` characters."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= limit else text[: limit - 1] + "…"


class TrackedRun:
    """Writes shared by parent and child runs. The run may not exist yet: `run_id` is set when it does."""

    def __init__(self, client: Any, outbox: Outbox, run_id: str | None = None) -> None:
        self._client, self._outbox, self.run_id = client, outbox, run_id
        self._sent: dict[str, dict[int, float]] | None = None  # what the run holds; None: not asked yet

    def params(self, values: Mapping[str, Any]) -> None:
        """Record parameters: nested mappings with dotted names, long values cut. A recorded one stays."""
        from mlflow.entities import Param

        flat = {clean_key(key): cut(value, _PARAM_CHARS) for key, value in flatten(values).items()}

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
        text = cut(value, TAG_CHARS)
        self._outbox.put(f"tag {key}", lambda: self._client.set_tag(self.run_id, clean_key(key), text))

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

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Record numbers at a step. The same numbers at the same step are recorded once."""
        now = now_ms()
        points = [(clean_key(key), float(value), now, step) for key, value in values.items()]

        def send() -> None:
            known = self._history()
            self._log([p for p in points if not _same(known.get(p[0], {}).get(p[3]), p[1])])

        self._outbox.put(f"{len(points)} metrics", send)

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
            for key, value, _, step in batch:
                self._history().setdefault(key, {})[step] = value


class StageRun(TrackedRun):
    """The child run of one stage. No method raises for MLflow's sake."""

    def __init__(self, client: Any, outbox: Outbox, stage: str, total_steps: int | None) -> None:
        super().__init__(client, outbox)
        self.stage, self._total_steps = stage, total_steps
        self._finished_ms: int | None = None  # end of a run that was finished before and has nothing new
        self._start_ms = now_ms()  # a run that MLflow takes later still began now
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
            run = self._client.create_run(experiment, self._start_ms, tags | own, self.stage)
            self._sent = {}
        self.run_id, self._start_ms = run.info.run_id, run.info.start_time

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

    def made(self, artifact: Manifest) -> None:
        """Record what the stage has stored."""
        self.tag("dpo.artifact_sha256", artifact.sha256)
        self.tag("dpo.artifact_uri", artifact.uri)

    def close(self, status: str, error: BaseException | None = None) -> None:
        """End the run: the rest of its metrics, the reason of a failure, the status."""
        for path in self._streams:
            self._outbox.put(f"metrics of {path}", lambda path=path: self._send_lines(path))  # type: ignore[misc]
        self._outbox.put("last metrics", lambda: self._log(self._last_points()))
        if error is not None:
            self.tag("dpo.error", one_line(error))
        end = now_ms()
        self._outbox.put("status", lambda: self._end(status, end))
        self._outbox.drain(PATIENCE[status])

    def _end(self, status: str, end: int) -> None:
        if status == "FINISHED" and self._finished_ms is not None:
            end = self._finished_ms
        # The clock may have been set back since the run began.
        self._client.set_terminated(self.run_id, status, max(end, self._start_ms))
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
            # A line without time gets one made of its step: the same at each attempt.
            when = int(float(moment) * 1000) if moment is not None else start_ms + step
        except (ValueError, KeyError, TypeError, AttributeError):
            if line.strip():
                log.warning("a line of the metrics file is not an object with a step: %.80r", line)
            continue
        for key, value in facts.items():
            if isinstance(value, int | float):
                points.append((clean_key(key), float(value), when, step))
    return points
