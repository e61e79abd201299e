"""Database files and servers, whoever's they are: checked, created whole, opened for many writers.

Neither Optuna nor MLflow survives a first start in parallel, or a kill during it, so a SQLite
database is made complete in a temporary file, under a lock, and then renamed.
"""

import contextlib
import os
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

_BUSY_TIMEOUT = 60_000  # milliseconds that a SQLite connection waits for another's write
_tuned: set[str] = set()
_unfinished: set[str] = set()  # files that are being created, of which nobody knows yet


def check_sqlite(option: str, url: str, path: Path, tables: set[str], owner: str) -> None:
    """Raise InputError where `path` is not a sound SQLite file with `tables`, nor to be made."""
    if len(path.name.encode()) > 200:
        raise InputError(
            f"{option} must be a file whose name has at most 200 bytes, but got {path.name!r}; "
            f"for example {option} sqlite:///new.db"
        )
    if "?" in url or ":memory:" in url:
        raise InputError(
            f"{option} must be sqlite:///PATH, a file without '?', but got {url!r}; "
            f"for example {option} sqlite:///{path.name.split('?')[0].strip(':') or 'study'}.db"
        )
    if not path.parent.is_dir():
        raise InputError(
            f"{option} must lie in an existing folder, but {str(path.parent)!r} is none; "
            "create it first"
        )
    if path.exists() and not path.is_file():
        raise InputError(f"{option} must be a file, but {str(path)!r} is a folder; name a file")
    if not os.access(path.parent, os.W_OK):
        raise InputError(
            f"{option} must be writable, but the folder {str(path.parent)!r} is not; "
            "choose another folder or change its permissions"
        )
    if not path.exists():
        return
    if not os.access(path, os.R_OK | os.W_OK):
        raise InputError(
            f"{option} must be readable and writable, but {str(path)!r} is not; "
            "change its permissions"
        )
    other = f"move it away or give another file, for example {option} sqlite:///new.db"
    try:
        if path.stat().st_size == 0:
            raise InputError(
                f"{option} must be {owner}'s database, but {str(path)!r} is empty; {other}"
            )
        with read_sqlite(path) as file:
            verdict = file.execute("PRAGMA quick_check(1)").fetchone()[0]
            if path.stat().st_size % file.execute("PRAGMA page_size").fetchone()[0]:
                verdict = "its end is missing"
            found = {
                row[0] for row in file.execute("SELECT name FROM sqlite_master WHERE type='table'")
            }
    except sqlite3.OperationalError as error:
        if "locked" in str(error) or "busy" in str(error):
            return  # in use, so sound; opening it will wait
        verdict, found = str(error), set()
    except sqlite3.DatabaseError as error:
        verdict, found = str(error), set()
    if verdict != "ok":
        raise InputError(
            f"{option} must be a sound SQLite database, but {str(path)!r} is not "
            f"({' '.join(str(verdict).split())[:120]}); {other}"
        )
    if not tables <= found:
        raise InputError(
            f"{option} must be {owner}'s database, but {str(path)!r} is another program's; {other}"
        )


def sqlite_mode(path: Path) -> str:
    """How to open `path` so that reading leaves every file as it was.

    A read-only connection to a database in WAL mode leaves an empty -wal and a -shm behind, which
    a writable one removes. A log that is there stays as it is under a read-only one. (A rollback
    journal that a crash left has to be applied before anyone can read.)
    """
    return "ro" if Path(f"{path}-wal").exists() else "rw"


def read_only_url(path: Path) -> str:
    """SQLAlchemy's URL of the SQLite file `path` that leaves every file as it was."""
    return f"sqlite:///{quote(path.as_uri())}?mode={sqlite_mode(path)}&uri=true"


@contextlib.contextmanager
def read_sqlite(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection that only reads `path` and leaves nothing behind."""
    uri = f"{path.as_uri()}?mode={sqlite_mode(path)}"
    with contextlib.closing(sqlite3.connect(uri, uri=True)) as connection:
        connection.execute("PRAGMA query_only=1")
        yield connection


def other_schema(path: Path, head: str) -> str | None:
    """The schema that the SQLite file `path` has in place of `head`, empty where it has none.

    None where it is `head`, or where the file is in use, so sound (see check_sqlite).
    """
    with read_sqlite(path) as file:
        try:
            row = file.execute("SELECT version_num FROM alembic_version").fetchone()
        except sqlite3.DatabaseError as error:
            if "locked" in str(error):
                return None
            row = None
    found = row[0] if row else ""
    return None if found == head else found


def tune_sqlite(path: Path) -> None:
    """From now on, open `path` in WAL mode and wait 60 s for locks, whoever connects here.

    Optuna's and MLflow's engines both pass through SQLAlchemy; other files are left alone.
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
        # Hundreds of statements, each a transaction, of a file that is removed if one fails.
        connection.execute("PRAGMA synchronous=OFF")
        connection.execute("PRAGMA journal_mode=MEMORY")
    if file in _tuned:
        connection.execute(f"PRAGMA busy_timeout={_BUSY_TIMEOUT}")
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")  # WAL: safe against kills


def create_sqlite(path: Path, fill: Callable[[str], None]) -> None:
    """Make the database `path`, complete or not at all; `fill` gets the URL of an empty file."""
    if path.exists():
        return
    with file_lock(path):
        if path.exists():  # another process was first
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
