"""PostgreSQL: connections that survive a restart, advisory locks, heartbeats of trials."""

import contextlib
import functools
import time
import warnings
from collections.abc import Callable, Iterator
from hashlib import sha256
from typing import Any, ParamSpec, TypeVar

import optuna
import sqlalchemy
from optuna.exceptions import ExperimentalWarning, StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import Engine

from search.config.urls import is_postgresql
from search.errors import InputError, one_line, redact

P = ParamSpec("P")
T = TypeVar("T")
SERVER_TIMEOUT = 30  # seconds that a server which was restarted gets to come back


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


# What PostgreSQL answers while it stops or starts. SQLAlchemy takes that for a cut connection in a
# statement, but not in what its dialect asks of a new connection.
_SHUTDOWN = ("57P01", "57P02", "57P03")


def is_cut(error: BaseException | None) -> bool:
    """Whether the server went away in the middle of a statement.

    Optuna tries some statements again itself, on a session that is beyond that by then.
    """
    if isinstance(error, sqlalchemy.exc.DBAPIError) and (
        error.connection_invalidated or getattr(error.orig, "sqlstate", None) in _SHUTDOWN
    ):
        return True
    return error is not None and is_cut(error.__cause__ or error.__context__)


def retry_if_cut(method: Callable[P, T]) -> Callable[P, T]:
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

    @retry_if_cut
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

    @retry_if_cut
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


HEARTBEAT = 10  # seconds between two signs of life of a trial
GRACE = 60  # seconds without one after which it is lost; longer than a restart is waited for


def escape_braces(url: str) -> str:
    """RDBStorage formats its URL; doubled braces survive that."""
    return url.replace("{", "{{").replace("}", "}}")


@retry_if_cut
def open_server_storage(url: str) -> "ServerStorage":
    """The storage behind `url`; its tables are made first where there are none.

    Optuna's own first start does not survive another at the same time.
    """
    with server_lock(url, "Optuna's tables"):
        try:
            return ServerStorage(url)
        except RuntimeError as error:  # tables of another Optuna
            raise InputError(
                f"--storage must be a database of Optuna {optuna.__version__}, but "
                f"{redact(url)} is not: {one_line(error)}"
            ) from None


class ServerStorage(RDBStorage):
    """A storage whose running trials give signs of life, and whose server may be restarted."""

    def __init__(self, url: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            super().__init__(
                escape_braces(url),
                engine_kwargs={"pool_pre_ping": True, "connect_args": connect_arguments(url)},
                heartbeat_interval=HEARTBEAT,
            )
        wait_for_server(self.engine)
        self.remove_session()
        self.engine.dispose()  # the connections so far are in the server's time zone, not in UTC

    @retry_if_cut
    def silent(self, study_id: int) -> set[int]:
        """The ids of the running trials that have given no sign of life for `GRACE` seconds.

        The server's clock alone counts.
        """
        trial, sign = models.TrialModel, models.TrialHeartbeatModel
        query = (
            sqlalchemy.select(trial.trial_id, sign.heartbeat, sqlalchemy.func.now())
            .outerjoin(sign, sign.trial_id == trial.trial_id)
            .where(trial.study_id == study_id, trial.state.in_([TrialState.RUNNING]))
        )
        with self.engine.connect() as connection:
            return {
                trial_id
                for trial_id, last, now in connection.execute(query)
                if last is None or (now.replace(tzinfo=None) - last).total_seconds() > GRACE
            }

    def _get_stale_trial_ids(self, study_id: int) -> list[int]:
        """None: Optuna would fail them without a reason, and `silent` knows them."""
        return []

    def _get_prepared_new_trial(
        self, study_id: int, template_trial: FrozenTrial | None, session: Any
    ) -> Any:
        """A new trial, with its first sign of life in the same transaction."""
        trial = super()._get_prepared_new_trial(study_id, template_trial, session)
        if template_trial is None or not template_trial.state.is_finished():
            session.add(models.TrialHeartbeatModel(trial_id=trial.trial_id))
        return trial

    def record_heartbeat(self, trial_id: int) -> None:
        """Give a sign of life; where the server does not take it, the next one will do."""
        try:
            super().record_heartbeat(trial_id)
        except (StorageInternalError, sqlalchemy.exc.SQLAlchemyError):
            return

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Any = None) -> bool:
        """End a trial, once, also where a cut connection hides that it was done."""
        deadline = time.monotonic() + SERVER_TIMEOUT
        cut = False
        while True:
            try:
                return super().set_trial_state_values(trial_id, state, values)
            except UpdateFinishedTrialError:
                if cut and self.get_trial(trial_id).state is state:
                    return True
                raise
            except StorageInternalError as error:
                if not is_cut(error) or time.monotonic() > deadline:
                    raise
                cut = True


for _name in (
    *("get_study_id_from_name", "get_study_name_from_id", "get_study_directions"),
    *("get_study_user_attrs", "get_study_system_attrs", "get_trial", "_get_trials"),
    *("set_study_user_attr", "set_study_system_attr", "set_trial_user_attr"),
    *("set_trial_system_attr", "_set_trial_param", "set_trial_intermediate_value"),
):
    setattr(ServerStorage, _name, retry_if_cut(getattr(RDBStorage, _name)))


def server_storage(study: optuna.Study) -> ServerStorage | None:
    """The server's storage of `study`; None where it lives in a file or in memory."""
    backend = getattr(study._storage, "_backend", study._storage)
    return backend if isinstance(backend, ServerStorage) else None
