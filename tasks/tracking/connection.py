"""The connection to MLflow: `must` waits for an answer, `attempt` gives up at once while MLflow is away."""

import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import requests
from filelock import FileLock
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from requests import HTTPError, RequestException
from sqlalchemy.exc import OperationalError

from dpo_core.errors import RecipeError, StageFailed
from dpo_core.redaction import redact
from tasks.recipe.sections import TrackingConfig
from tasks.signals import signals_deferred
from tasks.store.files import disk_fault, says_disk_full, says_read_only

log = logging.getLogger(__name__)
T = TypeVar("T")

START_PATIENCE = 30.0  # seconds to wait for an answer at the start of a run
RUN_PATIENCE = 180.0  # and later, when work would be lost
_PAUSE_SECONDS = 5.0  # between two attempts
_PROBE_SECONDS = 2.0
_REFUSALS = {
    "INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS", "INVALID_STATE",
    "BAD_REQUEST", "PERMISSION_DENIED", "UNAUTHENTICATED", "ENDPOINT_NOT_FOUND", "NOT_IMPLEMENTED",
}  # fmt: skip
_LATER = {408, 429}
"""HTTP statuses below 500 after which the same request may succeed."""


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


def one_line(error: BaseException) -> str:
    """An error's message on one line, with secrets redacted, for logs and tags."""
    return redact(" ".join(str(error).split()) or type(error).__name__)


class Connection:
    """MLflow's client, and whether MLflow answers. The client is opened when it is first used.

    Args:
        workspace: for the message if the disk of a local database is full.
    """

    def __init__(self, uri: str, workspace: Path) -> None:
        self.uri, self.place, self._workspace = uri, redact(uri), workspace
        self.lock = threading.RLock()
        """Held by each write, so that threads do not send the same thing twice."""
        self.disk_fault = False
        """Whether the last failure was a full or read-only disk, which waiting does not repair."""
        self._opened: Any = None
        self._down_since: float | None = None
        self._next_try = 0.0

    @property
    def client(self) -> Any:
        """MLflow's client.

        Raises:
            RecipeError: the folder of its database is not writable.
        """
        if self._opened is None:
            _quieten()
            try:
                make_database(self.uri)
            except OSError as error:
                raise RecipeError(
                    f"the tracking database's folder {error.filename} is not writable: {error.strerror}",
                    "Make it writable, or set tracking.uri.",
                ) from error
            self._opened = MlflowClient(self.uri, os.environ.get("MLFLOW_REGISTRY_URI") or self.uri)
        return self._opened

    def must(self, what: str, call: Callable[[Any], T], patience: float = START_PATIENCE) -> T:
        """The result of `call(client)`; repeats the call for `patience` seconds during an outage.

        Raises:
            StageFailed: MLflow does not answer, or its disk is full.
            RecipeError: MLflow rejects the request.
        """
        deadline = time.monotonic() + patience
        while True:
            try:
                with self._protected():
                    return call(self.client)
            except (RecipeError, StageFailed):
                raise
            except Exception as error:
                if getattr(error, "error_code", "") == "UNAUTHENTICATED":
                    raise RecipeError(
                        f"MLflow at {self.place} requires a valid user name and password",
                        "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
                    ) from error
                if not self._is_outage(error):
                    raise RecipeError(
                        f"MLflow at {self.place} refused {what}: {one_line(error)}",
                        "Check tracking.uri and the name in the message.",
                    ) from error
                if self.uri.startswith("sqlite:"):
                    fault = disk_fault(error, self._workspace, f"recording {what} in MLflow")
                    if fault:
                        raise fault from error
                if time.monotonic() > deadline:
                    raise StageFailed(
                        f"MLflow at {self.place} does not answer: {one_line(error)[:300]}",
                        "Start the server or correct tracking.uri, then resume the run.",
                    ) from error
                time.sleep(1)

    def attempt(self, what: str, send: Callable[[], None], *, force: bool = False) -> bool:
        """Try a write. True: it was sent, or MLflow rejected it for good. False: MLflow is away.

        Args:
            force: try although the pause after the last failure is not over.
        """
        if time.monotonic() < self._next_try and not force:
            return False
        try:
            if self._down_since is not None and self.uri.startswith("http"):
                # A hanging server would block the write itself for much longer.
                requests.get(self.uri.rstrip("/") + "/health", timeout=_PROBE_SECONDS)
            with self._protected():
                send()
        except Exception as error:
            if self._is_outage(error):
                if self._down_since is None:
                    self._down_since = time.monotonic()
                    log.warning(
                        "MLflow at %s does not answer (%s); the run continues, and metrics are sent later",
                        self.place,
                        one_line(error)[:300],
                    )
                self._next_try = time.monotonic() + _PAUSE_SECONDS
                return False
            log.warning("MLflow at %s refused %s: %s", self.place, what, one_line(error))
        if self._down_since is not None:
            away, self._down_since = time.monotonic() - self._down_since, None
            log.warning("MLflow at %s answers again after %.0f s", self.place, away)
        self._next_try = 0.0
        return True

    def _protected(self) -> AbstractContextManager[None]:
        """Context for a call that writes to MLflow's database directly: signals wait until it has finished.

        A server completes its own transactions, and a call to it that hangs must remain interruptible.
        """
        return nullcontext() if self.uri.startswith("http") else signals_deferred()

    def _is_outage(self, error: Exception) -> bool:
        """Whether an error means that MLflow is away, rather than that it rejects the request."""
        self.disk_fault = says_disk_full(error) or says_read_only(error)
        if self.disk_fault:
            return True
        if not isinstance(error, MlflowException | RequestException | OperationalError):
            return False
        if isinstance(error, HTTPError) and error.response is not None:  # of an upload
            return error.response.status_code >= 500 or error.response.status_code in _LATER
        return getattr(error, "error_code", "") not in _REFUSALS


def _quieten() -> None:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    # MLflow's own seven retries block a call for minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    # It logs the traceback of each error that it raises; `attempt` logs one line.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)


def make_database(uri: str) -> None:
    """Create the SQLite file of a tracking URI if it does not exist; other URIs are ignored.

    MLflow needs seconds to create its tables, and fails if two processes do so in one file at once. The file
    is therefore created under a lock and a temporary name, and renamed.

    Raises:
        OSError: its folder is not writable.
    """
    path = Path(uri.removeprefix("sqlite:///"))
    if not uri.startswith("sqlite:///") or path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        if path.exists():
            return
        temporary = path.with_name(f".{path.name}.new")
        # Left by a process that was killed here. SQLite would replay its journal into the new file.
        for left in path.parent.glob(f"{temporary.name}*"):
            left.unlink()
        SqlAlchemyStore(f"sqlite:///{temporary}", (path.parent / "mlartifacts").as_uri()).engine.dispose()
        temporary.replace(path)


def begin_writing(database: sqlite3.Connection) -> None:
    """Start a write transaction, which the caller rolls back.

    `begin immediate` alone succeeds on a read-only database too, so a table is created as well.

    Raises:
        sqlite3.Error: the database is read-only, or another process is writing.
    """
    database.execute("begin immediate")
    database.execute("create table dpo_tried_to_write (number)")


def create_if_missing(create: Callable[[], object]) -> None:
    """Call `create`; ignore MLflow's error if the object exists already."""
    try:
        create()
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def all_pages(search: Callable[..., Any]) -> list[Any]:
    """The results of all pages of an MLflow search."""
    page = search()
    results = list(page)
    while page.token:
        page = search(page_token=page.token)
        results += page
    return results
