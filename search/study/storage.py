"""The Optuna side: check, create and open a study."""

import contextlib
import uuid
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from alembic.script import ScriptDirectory
from optuna.exceptions import ExperimentalWarning, OptunaError
from optuna.storages import RDBStorage
from optuna.storages._rdb import models
from sqlalchemy.exc import SQLAlchemyError

from search.config.settings import StudyConfig, differences
from search.config.urls import sqlite_path, sqlite_url
from search.errors import InputError, RunError, one_line, redact
from search.study import postgres, sqlite
from search.task import DEFAULT_OBJECTIVE, METRICS, Metric, objective_of

ERRORS = (OSError, SQLAlchemyError, OptunaError)  # raised if a disk or a database fails
_BEFORE = {  # of studies of earlier versions
    "split": "last",
    "normalize": "none",
    "task": "classification",
    "class_weight": "none",
    "objective": DEFAULT_OBJECTIVE.name,
}
# Keys of user attributes of studies and trials: stored, so they never change.
SETTINGS, METADATA = "settings", "facts"  # as given by the user; what all trials share
UID, RUN_ID = "study_uid", "mlflow_run_id"  # the latter is a trial's run or the study's parent run
SLOT, OWNER, SEED, ENVIRONMENT = "place", "owner", "seed", "environment"
REASON, BY_ITSELF = "failure", "failed_by_itself"  # of a FAIL trial; its own training raised
VERSION = "model_version"  # of the registered model
BASELINES, BEST_BASELINE = "baselines", "best_baseline"  # the latter: its test, None if not kept
AGAINST = "against_baseline"  # of the winner: its comparison with the best baseline
_OPTUNA_TABLES = {"studies", "trials", "version_info"}


# ---- checks that change nothing -------------------------------------------------------------


def check(config: StudyConfig) -> None:
    """Raise InputError if `config.storage` is no Optuna database and can't become one.

    Changes nothing.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    path = sqlite_path(config.storage)
    if path is None:
        postgres.check_server("--storage", config.storage, "sqlite:///study.db")
        return
    sqlite.check_sqlite("--storage", config.storage, path, _OPTUNA_TABLES, "Optuna")
    if path.exists():
        upgrade = f"optuna storage upgrade --storage {redact(config.storage)}"
        sqlite.check_schema(
            "--storage", path, f"Optuna {optuna.__version__}", _alembic_head(), upgrade
        )


def _alembic_head() -> str:
    """As RDBStorage.get_head_version, but without creating a database."""
    scripts = ScriptDirectory(str(Path(models.__file__).with_name("alembic")))
    return str(scripts.get_current_head())


def _has_tables(url: str) -> bool:
    """Whether the database has Optuna's tables; changes nothing."""
    path = sqlite_path(url)
    if path is not None:
        return path.exists()  # created complete or not at all
    with postgres.connected(url) as connection:
        return sqlalchemy.inspect(connection).has_table("studies")


def stored_settings(config: StudyConfig) -> dict[str, Any] | None:
    """The settings that the study was created with; None if it does not exist yet.

    Changes nothing. Raises InputError if another program created the study.
    """
    with _read_only(config) as study:
        if study is None:
            return None
        settings: dict[str, Any] | None = study.user_attrs.get(SETTINGS)
        wanted = METRICS.get(config.objective)  # None: auto, which depends on the data
        if isinstance(settings, dict):
            wanted = objective_of(settings)
        _refuse_foreign(study, config, wanted)
        return settings


def check_same(config: StudyConfig, settings: dict[str, Any]) -> None:
    """Raise InputError if the study exists with other settings; changes nothing."""
    with _read_only(config) as study:
        if study is not None:
            _refuse_other(study, config, settings)


@contextlib.contextmanager
def _read_only(config: StudyConfig) -> Iterator[optuna.Study | None]:
    """The study, from a read-only file; None if it does not exist."""
    if not _has_tables(config.storage):
        yield None
        return
    path = sqlite_path(config.storage)
    if path is None:
        storage: RDBStorage = postgres.open_server_storage(config.storage)
    else:
        url = postgres.escape_braces(sqlite.read_only_url(path))
        storage = RDBStorage(url, skip_table_creation=True)
    study = None
    try:
        with contextlib.suppress(KeyError):  # no such study yet
            study = optuna.load_study(study_name=config.study_name, storage=storage)
        yield study
    finally:
        close(storage)


def _remedy(config: StudyConfig) -> str:
    return f"give another --study-name, for example --study-name {config.study_name}-2"


def _refuse_foreign(study: optuna.Study, config: StudyConfig, objective: Metric | None) -> None:
    """Raise InputError if another program created `study`, or for another direction."""
    stored = study.user_attrs.get(SETTINGS)
    directions = [direction.name.lower() for direction in study.directions]
    if objective is not None and directions != [objective.direction]:
        raise InputError(
            f"--study-name {config.study_name} must be a study that {objective.direction}s "
            f"{objective.name}, but direction: {', '.join(directions)} -> {objective.direction}; "
            f"{_remedy(config)}"
        )
    foreign = stored is not None or study.get_trials(deepcopy=False)
    if not isinstance(stored, dict) and foreign:
        raise InputError(
            f"--study-name {config.study_name} must be a study of this tool, but the one in "
            f"{redact(config.storage)} was created by another program; {_remedy(config)}"
        )


def _refuse_other(study: optuna.Study, config: StudyConfig, settings: dict[str, Any]) -> None:
    """Raise InputError if another program created `study` or it has other settings."""
    stored = study.user_attrs.get(SETTINGS, settings)
    given = objective_of(stored if isinstance(stored, Mapping) else settings)
    _refuse_foreign(study, config, given)
    if _digest(stored) == _digest(settings):  # the same data, perhaps in a renamed file
        settings = {**settings, "dataset": stored.get("dataset")}
    changed = differences({**_BEFORE, **stored}, {**_BEFORE, **settings})
    if changed:
        raise InputError(
            f"--study-name {config.study_name} exists with other settings (stored -> given): "
            f"{'; '.join(changed)}; {_remedy(config)}"
        )


def _digest(settings: Mapping[str, Any]) -> str:
    """The digest of the dataset, which settings contain as `NAME (DIGEST)`."""
    return str(settings.get("dataset")).rpartition(" ")[2]


# ---- creating and opening --------------------------------------------------------------------


def open_storage(url: str) -> RDBStorage:
    """Open Optuna's storage at `url`; creates its tables if there are none."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    path = sqlite_path(url)
    if path is None:
        return postgres.open_server_storage(url)

    sqlite.create_sqlite(
        path, lambda unfinished: close(RDBStorage(postgres.escape_braces(unfinished)))
    )
    sqlite.tune_sqlite(path)
    return RDBStorage(  # complete, and `check` has checked the schema
        postgres.escape_braces(sqlite_url(path)),
        skip_compatibility_check=True,
        skip_table_creation=True,
    )


def open_study(config: StudyConfig, settings: dict[str, Any]) -> optuna.Study:
    """Open the study of `config`; creates it if it does not exist.

    Raises InputError if it exists with other settings.
    """
    storage = open_storage(config.storage)
    study = optuna.create_study(
        study_name=config.study_name,
        storage=storage,
        direction=objective_of(settings).direction,
        load_if_exists=True,
    )
    try:
        _refuse_other(study, config, settings)
    except InputError:
        close(storage)
        raise
    if study.metric_names is None:
        with warnings.catch_warnings(action="ignore", category=ExperimentalWarning):
            study.set_metric_names([objective_of(settings).name])  # for optuna-dashboard
    if UID not in study.user_attrs:
        study.set_user_attr(UID, uuid.uuid4().hex)
    if SETTINGS not in study.user_attrs:
        study.set_user_attr(SETTINGS, settings)
    return study


def load_study(config: StudyConfig) -> optuna.Study:
    """Open the study of `config`. Raises InputError if this tool has not created one."""
    if _has_tables(config.storage):
        storage = open_storage(config.storage)
        with contextlib.suppress(KeyError):
            study = optuna.load_study(study_name=config.study_name, storage=storage)
            if METADATA in study.user_attrs:
                return study
        close(storage)
    raise InputError(
        f"--study-name must be a study of this tool, but {redact(config.storage)} has none named "
        f"{config.study_name}; list them with optuna studies --storage {redact(config.storage)}"
    )


@contextlib.contextmanager
def loaded(config: StudyConfig) -> Iterator[optuna.Study]:
    """As `load_study`; closes it after the block."""
    study = load_study(config)
    try:
        yield study
    finally:
        close_study(study)


def objective(study: optuna.Study) -> Metric:
    """The metric that `study` goes by."""
    return objective_of(study.user_attrs.get(SETTINGS, {}))


def write_note(study: optuna.Study, text: str) -> None:
    """Make `text` the study's note in optuna-dashboard, unless the user has edited it."""
    from optuna_dashboard import get_note, save_note

    shown, own = get_note(study), study.user_attrs.get("notes", [])
    if shown in ("", *own):
        study.set_user_attr("notes", [shown, text])  # first: a kill leaves either note
        save_note(study, text)


def failure(error: BaseException) -> RunError:
    """The error for a database, disk or server that failed during a run.

    It names the first cause; later errors often come only from handling it.
    """
    first = error
    while first.__cause__ is not None or first.__context__ is not None:
        first = first.__cause__ or first.__context__ or first
    return RunError(
        f"the study's records could not be written ({type(first).__name__}: {one_line(first)}); "
        "check the disk, the databases and the server, and run the same command again"
    )


def close_study(study: optuna.Study) -> None:
    """Close every connection of the storage behind `study`."""
    backend = postgres.backend_of(study)
    if isinstance(backend, RDBStorage):
        close(backend)


def close(storage: RDBStorage) -> None:
    """Close every connection of `storage`."""
    storage.remove_session()
    storage.engine.dispose()
