"""MLflow's SQLite database: made once, and there only when it is whole.

MLflow makes its tables in the file that it is given, over seconds. Of two processes that do so at once one
fails, for a table that it was about to make is there already.
"""

import os
import sqlite3
from pathlib import Path

from filelock import FileLock


def make_database(uri: str) -> None:
    """Make the database that the tracking URI names, where it is a file that is not there.

    It is made beside its place and renamed; of two processes at once one makes it.

    Raises:
        OSError: its folder cannot be written.
    """
    path = Path(uri.removeprefix("sqlite:///"))
    if not uri.startswith("sqlite:///") or path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        if path.exists():
            return
        temporary = path.with_name(f".{path.name}.new")
        # Of a process that was killed here. SQLite would play its journal back into the new file.
        for left in path.parent.glob(f"{temporary.name}*"):
            left.unlink()
        _make_tables(temporary, path.parent / "mlartifacts")
        os.replace(temporary, path)


def begin_writing(database: sqlite3.Connection) -> None:
    """Begin a transaction that writes, for the caller to roll back.

    `begin immediate` alone begins one also where the database can only be read.

    Raises:
        sqlite3.Error: it cannot be written, or another process is writing.
    """
    database.execute("begin immediate")
    database.execute("create table dpo_tried_to_write (number)")


def _make_tables(path: Path, artifacts: Path) -> None:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    SqlAlchemyStore(f"sqlite:///{path}", artifacts.as_uri()).engine.dispose()
