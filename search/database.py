"""Database files and servers, whoever's they are: checked, created whole, opened for many writers.

Neither Optuna nor MLflow survives a first start in parallel, or a kill during it, so a SQLite
database is made complete in a temporary file, under a lock, and then renamed.
"""

import contextlib
import functools
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, ParamSpec, TypeVar
from urllib.parse import quote

import sqlalchemy
from sqlalchemy.engine import Engine

from search.config import InputError, one_line
from search.imports import uncollected
from search.lock import file_lock
from search.urls import is_postgresql, redact, sqlite_url

P = ParamSpec("P")
T = TypeVar("T")

SERVER_TIMEOUT = 30  # seconds that a server which was restarted gets to come back
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


def check_server(option: str, url: str, example: str) -> None:
    """Raise InputError where no database answers at `url`, or only one in memory."""
    if url.startswith("sqlite"):
        raise InputError(
            f"{option} must be sqlite:///PATH, a file, but got {url!r}; "
            f"for example {option} {example}"
        )
    try:
        engine = sqlalchemy.create_engine(url)
        with engine.connect():
            pass
        engine.dispose()
    except Exception as error:  # a bad URL, a missing driver, a refused connection
        raise InputError(
            f"{option} must be a database that can be opened, for example {example}, "
            f"but {redact(url)!r} cannot: {one_line(error)}; check the URL and the server"
        ) from None


def _in_utc(dialect: Any, connection: Any) -> Any:
    """`connection`, on which one time is one time, whatever zone its machine is in."""
    if dialect.name == "postgresql":
        with connection.cursor() as cursor:
            cursor.execute("SET TIME ZONE 'UTC'")
        connection.commit()
    return connection


def connect_arguments(url: str) -> dict[str, Any]:
    """What makes a connection to PostgreSQL notice, within half a minute, that the network is cut.

    Parameters of libpq, so of the drivers psycopg and psycopg2.
    """
    dialect = sqlalchemy.make_url(url).get_dialect()
    if dialect.name != "postgresql" or not dialect.driver.startswith("psycopg"):
        return {}
    keepalives = {"keepalives_idle": 15, "keepalives_interval": 5, "keepalives_count": 3}
    return {**keepalives, "tcp_user_timeout": 30_000}


def wait_for_server(engine: Engine) -> None:
    """From now on, give a server that was restarted half a minute to take connections again."""

    def connect(dialect: Any, _: Any, arguments: Any, keywords: Any) -> Any:
        deadline = time.monotonic() + SERVER_TIMEOUT
        while True:
            try:
                return _in_utc(dialect, dialect.connect(*arguments, **keywords))
            except dialect.loaded_dbapi.OperationalError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)

    sqlalchemy.event.listen(engine, "do_connect", connect)


def is_cut(error: BaseException | None) -> bool:
    """Whether the server went away in the middle of a statement.

    Optuna tries some statements again itself, on a session that is beyond that by then.
    """
    if isinstance(error, sqlalchemy.exc.DBAPIError) and error.connection_invalidated:
        return True
    return error is not None and is_cut(error.__cause__ or error.__context__)


def patient(method: Callable[P, T]) -> Callable[P, T]:
    """`method`, which may be done again, until a server that was restarted takes it."""

    @functools.wraps(method)
    def patient(*arguments: P.args, **keywords: P.kwargs) -> T:
        deadline = time.monotonic() + SERVER_TIMEOUT
        while True:
            try:
                return method(*arguments, **keywords)
            except Exception as error:
                if not is_cut(error) or time.monotonic() > deadline:
                    raise

    return patient


class ServerLock:
    """A lock that a PostgreSQL server keeps for whoever holds it, on whatever host.

    The holder's connection is the lock: it goes when its process ends, or within half a minute when
    its host does. `holder` is what the others are told of it.
    """

    def __init__(self, url: str, name: str, holder: str = "") -> None:
        self._key = int.from_bytes(sha256(name.encode()).digest()[:8], signed=True)
        self._holder = holder
        self._engine = sqlalchemy.create_engine(
            url,
            poolclass=sqlalchemy.NullPool,
            isolation_level="AUTOCOMMIT",
            connect_args=connect_arguments(url),
        )
        wait_for_server(self._engine)
        self._connection: sqlalchemy.Connection | None = None

    @patient
    def acquire(self, *, wait: bool = True) -> bool:
        """Take the lock; False where another has it and `wait` is False."""
        connection = self._engine.connect()
        for name, value in (("application_name", self._holder), *_KEEPALIVES):
            self._ask(connection, "SELECT set_config(:name, :value, false)", name=name, value=value)
        function = "pg_advisory_lock" if wait else "pg_try_advisory_lock"
        if self._ask(connection, f"SELECT {function}(:key)", key=self._key) is False:
            connection.close()
            return False
        self._connection = connection
        return True

    def is_held(self) -> bool:
        """Whether the connection is still there: a server that was restarted forgets its locks."""
        try:
            return self._connection is not None and self._ask(self._connection, "SELECT 1") == 1
        except sqlalchemy.exc.DBAPIError:
            self.release()
            return False

    def release(self) -> None:
        """Let it go."""
        if self._connection is not None:
            with contextlib.suppress(sqlalchemy.exc.DBAPIError):
                self._connection.close()
            self._connection = None

    @patient
    def find_holder(self) -> str | None:
        """What the holder says of itself; None where nobody has the lock."""
        with self._engine.connect() as connection:
            found = self._ask(
                connection,
                "SELECT a.application_name FROM pg_locks l JOIN pg_stat_activity a USING (pid) "
                "WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1 "
                "AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database()) "
                "AND (l.classid::bigint << 32) | l.objid::bigint = :key",
                key=self._key,
            )
        return None if found is None else str(found)

    @staticmethod
    def _ask(connection: sqlalchemy.Connection, query: str, **values: Any) -> Any:
        return connection.execute(sqlalchemy.text(query), values).scalar()


_KEEPALIVES = (  # seconds, so that a host that went down loses its locks
    *(("tcp_keepalives_idle", "15"), ("tcp_keepalives_interval", "5")),
    ("tcp_keepalives_count", "3"),
)


@contextlib.contextmanager
def server_lock(url: str, name: str) -> Iterator[None]:
    """Hold the lock `name` of the server at `url`; of one that has none, hold nothing."""
    if not is_postgresql(url):
        yield
        return
    lock = ServerLock(url, name)
    lock.acquire()
    try:
        yield
    finally:
        lock.release()


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
