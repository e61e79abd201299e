"""PostgreSQL: connections that survive a restart, advisory locks, heartbeats of trials."""

import contextlib
import warnings
from collections.abc import Iterator
from hashlib import sha256
from typing import Any

import optuna
import sqlalchemy
import tenacity
from optuna.exceptions import ExperimentalWarning, StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, RDBStorage
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import Engine

from search.config.urls import is_postgresql
from search.errors import InputError, one_line, redact

_RESTART = tenacity.stop_after_delay(30)  # seconds that a server gets to restart
_KEEPALIVES = {"keepalives_idle": 15, "keepalives_interval": 5, "keepalives_count": 3}  # seconds
HEARTBEAT = 10  # seconds between two heartbeats of a running trial
GRACE = 60  # seconds without a heartbeat after which a trial is lost; longer than a restart


@contextlib.contextmanager
def connected(url: str) -> Iterator[sqlalchemy.Connection]:
    """A connection to the database at `url`, closed at the end of the block."""
    engine = sqlalchemy.create_engine(url)
    try:
        with engine.connect() as connection:
            yield connection
    finally:
        engine.dispose()


def check_server(option: str, url: str, example: str) -> None:
    """Raise InputError if no database server answers at `url`."""
    if url.startswith("sqlite"):
        raise InputError(
            f"{option} must be sqlite:///PATH, a file, but got {url!r}; "
            f"for example {option} {example}"
        )
    try:
        with connected(url):
            pass
    except Exception as error:  # a bad URL, a missing driver, a refused connection
        raise InputError(
            f"{option} must be a database that can be opened, for example {example}, "
            f"but {redact(url)!r} cannot: {one_line(error)}; check the URL and the server"
        ) from None


def connect_arguments(url: str) -> dict[str, Any]:
    """Arguments that make a PostgreSQL connection notice a cut network within half a minute.

    Connecting is given up after 8 s, to be repeated: a server that restarts at another address
    leaves the old one silent. Parameters of libpq, so only for psycopg and psycopg2.
    """
    dialect = sqlalchemy.make_url(url).get_dialect()
    if dialect.name != "postgresql" or not dialect.driver.startswith("psycopg"):
        return {}
    return {**_KEEPALIVES, "tcp_user_timeout": 30_000, "connect_timeout": 8}


def wait_for_server(engine: Engine) -> None:
    """Let `engine` wait up to 30 s for a restarting server when it connects."""

    def connect(dialect: Any, _: Any, arguments: Any, keywords: Any) -> Any:
        failed = tenacity.retry_if_exception_type(dialect.loaded_dbapi.OperationalError)
        again = tenacity.Retrying(
            retry=failed, stop=_RESTART, wait=tenacity.wait_fixed(0.2), reraise=True
        )
        return again(lambda: _in_utc(dialect, dialect.connect(*arguments, **keywords)))

    sqlalchemy.event.listen(engine, "do_connect", connect)


def _in_utc(dialect: Any, connection: Any) -> Any:
    """`connection`, set to UTC, so that timestamps do not depend on the server's time zone."""
    if dialect.name == "postgresql":
        with connection.cursor() as cursor:
            cursor.execute("SET TIME ZONE 'UTC'")
        connection.commit()
    return connection


# PostgreSQL's codes while it stops or starts. SQLAlchemy recognizes them as a lost connection in a
# statement, but not in what its dialect asks of a new connection.
_SHUTDOWN = ("57P01", "57P02", "57P03")


def is_cut(error: BaseException | None) -> bool:
    """Whether the connection was lost in the middle of a statement.

    The cause may be deeper: Optuna retries some statements itself, on a broken session.
    """
    if isinstance(error, sqlalchemy.exc.DBAPIError) and (
        error.connection_invalidated or getattr(error.orig, "sqlstate", None) in _SHUTDOWN
    ):
        return True
    return error is not None and is_cut(error.__cause__ or error.__context__)


# Decorates what can be repeated: repeats it until a restarted server accepts it, for up to 30 s.
retry_if_cut = tenacity.retry(
    retry=tenacity.retry_if_exception_type(Exception) & tenacity.retry_if_exception(is_cut),
    stop=_RESTART,
    reraise=True,
)


class ServerLock:
    """An advisory lock of a PostgreSQL server, for processes on any host.

    It lasts as long as the holder's connection: until its process ends, or half a minute after its
    host goes down. holder: a description of this process, for `find_holder`.
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

    @retry_if_cut
    def acquire(self, *, wait: bool = True) -> bool:
        """Take the lock; False if another process holds it and `wait` is False."""
        connection = self._engine.connect()
        keepalives = {f"tcp_{name}": str(value) for name, value in _KEEPALIVES.items()}
        for name, value in {"application_name": self._holder, **keepalives}.items():
            self._ask(connection, "SELECT set_config(:name, :value, false)", name=name, value=value)
        function = "pg_advisory_lock" if wait else "pg_try_advisory_lock"
        if self._ask(connection, f"SELECT {function}(:key)", key=self._key) is False:
            connection.close()
            return False
        self._connection = connection
        return True

    def is_held(self) -> bool:
        """Whether the connection is still open: a restarted server has released all locks."""
        try:
            return self._connection is not None and self._ask(self._connection, "SELECT 1") == 1
        except sqlalchemy.exc.DBAPIError:
            self.release()
            return False

    def release(self) -> None:
        """Release the lock."""
        if self._connection is not None:
            with contextlib.suppress(sqlalchemy.exc.DBAPIError):
                self._connection.close()
            self._connection = None

    @retry_if_cut
    def find_holder(self) -> str | None:
        """The holder's description of itself; None if nobody holds the lock."""
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


@contextlib.contextmanager
def server_lock(url: str, name: str) -> Iterator[None]:
    """Hold the advisory lock `name` of the server at `url`; a no-op unless it is PostgreSQL."""
    if not is_postgresql(url):
        yield
        return
    lock = ServerLock(url, name)
    lock.acquire()
    try:
        yield
    finally:
        lock.release()


def escape_braces(url: str) -> str:
    """`url` for RDBStorage, which calls `str.format` on it."""
    return url.replace("{", "{{").replace("}", "}}")


@retry_if_cut
def open_server_storage(url: str) -> "ServerStorage":
    """Open the storage at `url`; creates its tables if there are none.

    Under a lock: Optuna's own creation fails if two processes do it at once.
    """
    with server_lock(url, "Optuna's tables"):
        try:
            return ServerStorage(url)
        except RuntimeError as error:  # tables of another version
            raise InputError(
                f"--storage must be a database of Optuna {optuna.__version__}, but "
                f"{redact(url)} is not: {one_line(error)}"
            ) from None


class ServerStorage(RDBStorage):
    """A storage with heartbeats of running trials, whose server may be restarted."""

    def __init__(self, url: str) -> None:
        with warnings.catch_warnings(action="ignore", category=ExperimentalWarning):
            super().__init__(
                escape_braces(url),
                engine_kwargs={"pool_pre_ping": True, "connect_args": connect_arguments(url)},
                heartbeat_interval=HEARTBEAT,
            )
        wait_for_server(self.engine)
        self.remove_session()
        self.engine.dispose()  # connections opened so far are not in UTC

    @retry_if_cut
    def without_heartbeat(self, study_id: int) -> set[int]:
        """The ids of the running trials without a heartbeat for `GRACE` s by the server's clock."""
        trial, beat = models.TrialModel, models.TrialHeartbeatModel
        query = (
            sqlalchemy.select(trial.trial_id, beat.heartbeat, sqlalchemy.func.now())
            .outerjoin(beat, beat.trial_id == trial.trial_id)
            .where(trial.study_id == study_id, trial.state.in_([TrialState.RUNNING]))
        )
        with self.engine.connect() as connection:
            return {
                trial_id
                for trial_id, last, now in connection.execute(query)
                if last is None or (now.replace(tzinfo=None) - last).total_seconds() > GRACE
            }

    def _get_stale_trial_ids(self, study_id: int) -> list[int]:
        """No ids, or Optuna would end those trials itself, without a recorded reason."""
        return []

    def _get_prepared_new_trial(
        self, study_id: int, template_trial: FrozenTrial | None, session: Any
    ) -> Any:
        """A new trial, with its first heartbeat in the same transaction."""
        trial = super()._get_prepared_new_trial(study_id, template_trial, session)
        if template_trial is None or not template_trial.state.is_finished():
            session.add(models.TrialHeartbeatModel(trial_id=trial.trial_id))
        return trial

    def record_heartbeat(self, trial_id: int) -> None:
        """Record a heartbeat; a failure is ignored, as the next one follows soon."""
        with contextlib.suppress(StorageInternalError, sqlalchemy.exc.SQLAlchemyError):
            super().record_heartbeat(trial_id)

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Any = None) -> bool:
        """End a trial, once: a lost connection may hide that the first attempt succeeded."""
        write, attempts = super().set_trial_state_values, 0

        @retry_if_cut
        def end() -> bool:
            nonlocal attempts
            attempts += 1
            try:
                return write(trial_id, state, values)
            except UpdateFinishedTrialError:
                if attempts > 1 and self.get_trial(trial_id).state is state:
                    return True
                raise

        return end()


for _name in (
    *("get_study_id_from_name", "get_study_name_from_id", "get_study_directions"),
    *("get_study_user_attrs", "get_study_system_attrs", "get_trial", "_get_trials"),
    *("set_study_user_attr", "set_study_system_attr", "set_trial_user_attr"),
    *("set_trial_system_attr", "_set_trial_param", "set_trial_intermediate_value"),
):
    setattr(ServerStorage, _name, retry_if_cut(getattr(RDBStorage, _name)))


def backend_of(study: optuna.Study) -> BaseStorage:
    """The storage behind the cache that Optuna puts around it; Optuna has no public way to it."""
    backend: BaseStorage = getattr(study._storage, "_backend", study._storage)
    return backend


def server_storage(study: optuna.Study) -> ServerStorage | None:
    """The storage of a study on a database server; None for a file or memory."""
    backend = backend_of(study)
    return backend if isinstance(backend, ServerStorage) else None
