"""Creates MLflow's SQLite database atomically, so that no process ever opens a half-made one.

MLflow needs seconds to create its tables. If two processes do so in one file at once, one of them fails
because a table exists already.
"""

import os
import sqlite3
from pathlib import Path

from filelock import FileLock
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore


def make_database(uri: str) -> None:
    """Create the SQLite file of a tracking URI if it does not exist; other URIs are ignored.

    The file is created under a temporary name and renamed. A lock makes a second process wait for it.

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
        _make_tables(temporary, path.parent / "mlartifacts")
        os.replace(temporary, path)


def begin_writing(database: sqlite3.Connection) -> None:
    """Start a write transaction, which the caller rolls back.

    `begin immediate` alone succeeds on a read-only database too, so a table is created as well.

    Raises:
        sqlite3.Error: the database is read-only, or another process is writing.
    """
    database.execute("begin immediate")
    database.execute("create table dpo_tried_to_write (number)")


def _make_tables(path: Path, artifacts: Path) -> None:
    SqlAlchemyStore(f"sqlite:///{path}", artifacts.as_uri()).engine.dispose()
