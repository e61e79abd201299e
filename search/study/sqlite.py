"""SQLite files of Optuna and MLflow: validation, atomic creation, concurrent writers.

Neither Optuna nor MLflow survives two first starts at once, or a kill during one. So a database is
created in a temporary file, under a lock, and renamed when it is complete.
"""

import contextlib
import os
import re
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import sqlalchemy
from sqlalchemy.engine import Engine

from search.config.urls import sqlite_url
from search.errors import InputError
from search.imports import uncollected
from search.study.lock import file_lock

_BUSY_TIMEOUT = 60_000  # milliseconds that a connection waits for another one's write
_tuned: set[str] = set()
_unfinished: set[str] = set()  # files that are being created


def check_sqlite(option: str, url: str, path: Path, tables: set[str], owner: str) -> None:
    """Raise InputError if `path` is no sound SQLite file with `tables` and can't be created."""
    problem = _problem_of_path(option, url, path)
    if problem is None and path.exists():
        problem = _problem_of_content(path, tables, owner)
        if problem is not None:
            problem += f"; move it away or give another file, for example {option} sqlite:///new.db"
    if problem is not None:
        raise InputError(f"{option} must be {problem}")


def _problem_of_path(option: str, url: str, path: Path) -> str | None:
    folder = path.parent
    if len(path.name.encode()) > 200:
        rule = f"a file whose name has at most 200 bytes, but got {path.name!r}"
        return f"{rule}; for example {option} sqlite:///new.db"
    if "?" in url or ":memory:" in url:
        name = path.name.split("?")[0].strip(":") or "study"
        rule = f"sqlite:///PATH, a file without '?', but got {url!r}"
        return f"{rule}; for example {option} sqlite:///{name}.db"
    if not folder.is_dir():
        return f"in an existing folder, but {str(folder)!r} is none; create it first"
    if path.exists() and not path.is_file():
        return f"a file, but {str(path)!r} is a folder; name a file"
    if not os.access(folder, os.W_OK):
        remedy = "choose another folder or change its permissions"
        return f"writable, but the folder {str(folder)!r} is not; {remedy}"
    if path.exists() and not os.access(path, os.R_OK | os.W_OK):
        return f"readable and writable, but {str(path)!r} is not; change its permissions"
    return None


def _problem_of_content(path: Path, tables: set[str], owner: str) -> str | None:
    if path.stat().st_size == 0:
        return f"{owner}'s database, but {str(path)!r} is empty"
    found = set()
    try:
        with read_sqlite(path) as file:
            verdict = file.execute("PRAGMA quick_check(1)").fetchone()[0]
            if path.stat().st_size % file.execute("PRAGMA page_size").fetchone()[0]:
                verdict = "its end is missing"
            rows = file.execute("SELECT name FROM sqlite_master WHERE type='table'")
            found = {row[0] for row in rows}
    except sqlite3.DatabaseError as error:
        verdict = str(error)
        if isinstance(error, sqlite3.OperationalError) and re.search("locked|busy", verdict):
            return None  # in use, so sound; opening it waits
    if verdict != "ok":
        why = " ".join(str(verdict).split())[:120]
        return f"a sound SQLite database, but {str(path)!r} is not ({why})"
    if not tables <= found:
        return f"{owner}'s database, but {str(path)!r} is another program's"
    return None


def check_schema(option: str, path: Path, version: str, head: str, upgrade: str) -> None:
    """Raise InputError if the SQLite file `path` has another schema than `head`.

    version: the program, and its version, whose schema is `head`. upgrade: its upgrade command.
    """
    with read_sqlite(path) as file:
        try:
            row = file.execute("SELECT version_num FROM alembic_version").fetchone()
        except sqlite3.DatabaseError as error:
            if "locked" in str(error):
                return  # in use, so sound
            row = None
    found = (row and row[0]) or "of an earlier version"
    if found != head:
        raise InputError(
            f"{option} must be a database of {version}, but {str(path)!r} has the schema {found}; "
            f"copy the file and run {upgrade}, or give another file"
        )


def sqlite_mode(path: Path) -> str:
    """The mode to open `path` in so that reading leaves all files unchanged.

    Without a write-ahead log, a read-only connection in WAL mode would leave an empty -wal and a
    -shm file behind, which a writable one removes. With one, only a read-only one leaves it alone.
    (A rollback journal that a crash left must be applied before anyone can read.)
    """
    return "ro" if Path(f"{path}-wal").exists() else "rw"


def read_only_url(path: Path) -> str:
    """SQLAlchemy's URL of the SQLite file `path` for reading without changing any file."""
    return f"sqlite:///{quote(path.as_uri())}?mode={sqlite_mode(path)}&uri=true"


@contextlib.contextmanager
def read_sqlite(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection that only reads `path` and leaves no files behind."""
    uri = f"{path.as_uri()}?mode={sqlite_mode(path)}"
    with contextlib.closing(sqlite3.connect(uri, uri=True)) as connection:
        connection.execute("PRAGMA query_only=1")
        yield connection


def tune_sqlite(path: Path) -> None:
    """Let all later connections to `path` in this process use WAL mode and wait 60 s for locks.

    Optuna and MLflow both connect through SQLAlchemy; other files are left alone.
    """
    _tune_connections()
    _tuned.add(str(path.resolve()))


def _tune_connections() -> None:
    if not sqlalchemy.event.contains(Engine, "connect", _on_connect):
        sqlalchemy.event.listen(Engine, "connect", _on_connect)


def _on_connect(connection: Any, _: Any) -> None:
    if not isinstance(connection, sqlite3.Connection):
        return
    file = connection.execute("PRAGMA database_list").fetchone()[2]
    if file in _unfinished:
        # For speed: hundreds of transactions, and the file is removed if one fails.
        connection.execute("PRAGMA synchronous=OFF")
        connection.execute("PRAGMA journal_mode=MEMORY")
    if file in _tuned:
        connection.execute(f"PRAGMA busy_timeout={_BUSY_TIMEOUT}")
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")  # safe against kills in WAL mode


def create_sqlite(path: Path, fill: Callable[[str], None]) -> None:
    """Create the database `path`, complete or not at all; `fill` gets the URL of an empty file."""
    if path.exists():
        return
    with file_lock(path):
        if path.exists():  # another process was faster
            return
        unfinished = path.with_name(f".{path.name}.unfinished")
        unfinished.unlink(missing_ok=True)
        file = str(unfinished.resolve())
        _tune_connections()
        _unfinished.add(file)
        try:
            with uncollected():
                fill(sqlite_url(unfinished))
            with unfinished.open("rb") as written:
                os.fsync(written.fileno())
            unfinished.rename(path)
        finally:
            _unfinished.discard(file)
            unfinished.unlink(missing_ok=True)
